"""The code that the ahead-of-time build makes, and its signatures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.aot.artefact import SCRATCH, Artefact, artefacts
from tests.tools.kernel_builds import PLANES, ROOT, build, environment, run_python


@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
def test_signatures_say_what_the_kernel_takes(built: Path, arch: str) -> None:
    artefact = Artefact.read(built, PLANES["fp16"], arch)
    assert artefact.arguments == (("x_ptr", "*fp16"), ("out_ptr", "*i32"), ("pixels", "i32"), *SCRATCH)
    assert (artefact.op, artefact.arch, artefact.block, artefact.shared) == ("to_image", arch, (128, 1, 1), 0)
    assert artefact.constants == {"BLOCK": 128}
    assert artefact.divisible == ("x_ptr", "out_ptr", "pixels")
    ptx, cubin = artefact.code("ptx").decode(), artefact.code("cubin")
    entry = re.search(rf"\.visible \.entry {artefact.entry}\(([^)]*)\)\s*\.reqntid 128", ptx)
    assert entry and re.findall(r"\.param \.(\w+)", entry[1]) == ["u64", "u64", "u32", "u64", "u64"]
    assert re.search(rf"\.target {arch}a?$", ptx, re.MULTILINE)
    assert cubin.startswith(b"\x7fELF")
    assert artefact.entry.encode() in cubin


def test_loads_are_as_wide_as_the_promised_alignment_allows(built: Path) -> None:
    """Four fp16 pixels of a plane are one load of 64 bits; without `divisible` they would be four of 16."""
    ptx = Artefact.read(built, PLANES["fp16"], "sm_90").code("ptx").decode()
    assert len(re.findall(r"ld\.global\.v2\.b32", ptx)) == len(re.findall(r"ld\.global", ptx)) == 3


def test_code_holds_no_file_names(built: Path) -> None:
    for artefact in artefacts(built):
        assert not re.search(r"\.(loc|file)\s", artefact.code("ptx").decode())
        for kind in ("ptx", "cubin"):
            code = artefact.code(kind)
            assert not [name for name in (b"to_image.py", b"/tmp", os.fsencode(ROOT)) if name in code]


@pytest.mark.slow
def test_a_large_kernel_assembles_to_the_same_bytes(tmp_path: Path) -> None:
    """ptxas by itself makes others of this one from run to run, and with other paths and limits."""
    ptx = tmp_path / "attention.ptx"
    run_python("from pathlib import Path\nfrom kernels.aot.compiler import compile_variant\n"
               "from kernels.aot.plan import variants_of\n"
               "variant = variants_of('attention')['attention_fp32_d80_64x32_tf32x3_w8_s2']\n"
               f"Path({str(ptx)!r}).write_bytes(compile_variant(variant, 90)[1]['ptx'])")
    code = ("import hashlib, pathlib, resource, sys, tempfile\nfrom kernels.aot import assemble\n"
            "stack = resource.RLIMIT_STACK\n"
            "resource.setrlimit(stack, (int(sys.argv[3]), resource.getrlimit(stack)[1]))\n"
            "tempfile.tempdir = sys.argv[2]\nassemble.fix_addresses() or sys.exit('addresses are not fixed')\n"
            "print(hashlib.sha256(assemble.assemble(pathlib.Path(sys.argv[1]).read_text(), 90)).hexdigest())")
    deep = tmp_path / ("long" * 25) / ("long" * 25)
    deep.mkdir(parents=True)
    made = {subprocess.run([sys.executable, "-c", code, ptx, directory, str(stack)], cwd=ROOT, check=True, text=True,
                           env=environment(PAD="x" * pad), stdout=subprocess.PIPE).stdout
            for directory, stack, pad in ((tmp_path, 8 << 20, 0), (deep, 8 << 20, 0), (tmp_path, 4 << 20, 5000))}
    assert len(made) == 1


@pytest.mark.slow
def test_guidance_step_takes_what_the_runtime_passes(tmp_path: Path, cache: Path) -> None:
    build(tmp_path, cache, "--op", "guidance_step", "--arch", "sm_90")
    artefact = Artefact.read(tmp_path, "guidance_step_fp16_memory3", "sm_90")
    pointers = ("noise_pred_ptr", "noise_ptr", "table_ptr", "controls_ptr", "known_ptr", "state_ptr", "sample_ptr",
                "timestep_ptr", "progress_ptr")
    assert [name for name, _ in artefact.arguments] == [
        *pointers, "n", "first", "rows", "draws", *(name for name, _ in SCRATCH)]
    assert [kind for _, kind in artefact.arguments] == [
        "*fp16", *["*fp32"] * 5, "*fp16", "*fp32", "*i32", *["i32"] * 4, *(kind for _, kind in SCRATCH)]
    assert artefact.constants == {"MEMORY": 3, "BLOCK": 512, "CHUNK": 4096}
    assert "bar.sync" in artefact.code("ptx").decode()
