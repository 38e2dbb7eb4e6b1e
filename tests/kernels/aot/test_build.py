"""The ahead-of-time build: what it compiles, writes and removes, whatever else happens at the same time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from kernels.aot.artefact import Artefact, artefacts
from tests.tools.kernel_builds import PLANES, ROOT, build, contents, environment, run_python


def test_every_variant_is_built_where_its_dtype_runs(built: Path) -> None:
    layouts = ("interleaved", "planes")
    assert [(a.arch, a.name) for a in artefacts(built)] == [
        (arch, f"to_image_{dtype}_{layout}") for arch, dtypes in (("sm_75", ("fp16", "fp32")),
                                                                  ("sm_90", ("bf16", "fp16", "fp32")))
        for dtype in dtypes for layout in layouts]


def test_a_second_build_compiles_and_writes_nothing(built: Path, cache: Path) -> None:
    before = {f: f.stat().st_mtime_ns for f in built.rglob("*.*") if f.name != ".lock"}
    report = build(built, cache, "--op", "to_image", "--arch", "sm_75,sm_90")
    assert (report["compiled"], report["cached"]) == (0, 10)
    assert {f: f.stat().st_mtime_ns for f in built.rglob("*.*") if f.name != ".lock"} == before


def test_a_build_removes_what_it_no_longer_makes_and_nothing_else(built: Path, cache: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(built, tmp_path / "copy")
    arch = copy / "sm_90"
    old = json.loads((arch / f"{PLANES['fp16']}.json").read_text())
    for op, name in (("to_image", "to_image_int8"), ("attention", "attention_fp16")):
        files = {kind: f"{name}.0123456789ab.{kind}" for kind in ("ptx", "cubin")}
        (arch / f"{name}.json").write_text(json.dumps(old | {"op": op, "name": name, "files": files}))
        for file in files.values():
            (arch / file).write_bytes(b"old")
    (arch / "notes.txt").write_text("mine")
    (arch / f"{PLANES['fp16']}.ba9876543210.cubin").write_bytes(b"replaced")
    (arch / f"{PLANES['bf16']}.json").write_text("half a sig")
    build(copy, cache, "--op", "to_image", "--arch", "sm_90")
    names = {f.name for f in arch.iterdir()}
    assert {"notes.txt", "attention_fp16.json", "attention_fp16.0123456789ab.cubin"} <= names
    assert not [name for name in names if "int8" in name or "ba9876543210" in name]
    assert Artefact.read(copy, PLANES["bf16"], "sm_90").code("cubin")


@pytest.mark.slow
def test_another_checkout_gives_the_same_bytes(built: Path, tmp_path: Path) -> None:
    """Other paths, another working directory, an empty cache."""
    checkout = tmp_path / "elsewhere" / "a much longer path"
    shutil.copytree(ROOT / "kernels", checkout / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    build(tmp_path / "out", tmp_path / "cache", "--op", "to_image", "--arch", "sm_75,sm_90", cwd=checkout)
    assert contents(tmp_path / "out") == contents(built)


@pytest.mark.slow
def test_a_change_in_what_a_kernel_calls_is_compiled_again(built: Path, cache: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "kernels" / "triton" / "to_image.py"
    text = source.read_text(encoding="utf8")
    assert text.count("* 0.5 + 0.5\n") == 1, "expected the arithmetic of _to_byte on a line of its own"
    source.write_text(text.replace("* 0.5 + 0.5\n", "* 0.5 + 0.25\n"), encoding="utf8")
    report = build(tmp_path / "out", cache, "--op", "to_image", "--arch", "sm_90", cwd=tmp_path)
    assert (report["compiled"], report["cached"]) == (6, 0)
    name = PLANES["fp16"]
    assert Artefact.read(tmp_path / "out", name, "sm_90").hashes != Artefact.read(built, name, "sm_90").hashes


@pytest.mark.slow
def test_two_builds_at_once_end_like_one(built: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kernels", "build", "--op", "to_image", "--arch", "sm_75,sm_90", "-j", "1",
               "-o", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    both = [subprocess.Popen(command, cwd=ROOT, env=environment()) for _ in range(2)]
    assert [process.wait(timeout=600) for process in both] == [0, 0]
    assert contents(tmp_path / "out") == contents(built)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["terminal", "parent only"])
def test_ctrl_c_leaves_finished_kernels_and_no_process(tmp_path: Path, who: str) -> None:
    """A terminal sends SIGINT to all processes of the build, `kill -INT` to the first one alone."""
    command = [sys.executable, "-m", "kernels", "build", "--op", "guidance_step", "-j", "2",
               "-o", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(TMPDIR=str(tmp_path)), stderr=subprocess.PIPE,
                               text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("cache/*/*.zip")):
        assert process.poll() is None and time.monotonic() < deadline, "expected a first kernel before the end"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT) if who == "terminal" else process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines()[-1].startswith("interrupted")
    assert "Traceback" not in stderr
    with pytest.raises(ProcessLookupError):
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    entries = list(tmp_path.glob("cache/*/*"))
    assert entries and all(zipfile.ZipFile(entry).testzip() is None for entry in entries)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("latentrt-kernels-*"))


@pytest.mark.slow
def test_a_kernel_that_does_not_fit_is_left_out(tmp_path: Path) -> None:
    """Here a GPU of 1 kB, on which the smallest of guidance_step needs no more; compiled without other processes."""
    report = run_python(f"""
from pathlib import Path
from kernels.aot import build, cache, compiler, plan
plan.MAX_SHARED[90] = 1024
def compile_here(compilations, store, processes):
    for c in compilations:
        cache.write(store, c.key, compiler.compile_entry(c.variant.op, c.variant.name, c.arch,
                                                         c.variant.kernel.cache_key))
build.compile_all = compile_here
built = build.build(Path({str(tmp_path / "out")!r}), archs=[90], ops=["guidance_step"], cache=Path({str(tmp_path)!r}))
print(*(a.name for a in built.artefacts), "|", *(a.name for a in built.unfit))
""")
    fit, unfit = (part.split() for part in report.split("|"))
    assert fit == [f"guidance_step_{dtype}_memory7" for dtype in ("fp16", "bf16", "fp32")]
    assert [a.name for a in artefacts(tmp_path / "out")] == sorted(fit)
    assert len(unfit) == 6
