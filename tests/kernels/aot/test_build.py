"""The ahead-of-time build through its command line, reading it without torch, and launching it through cuda.core.

Tests run with interpreted kernels where there is no GPU, so everything that compiles is a process of its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from kernels.aot import build as aot
from kernels.aot.artefact import ARCHS, SCRATCH, Artefact, KernelError, arch_for, artefacts
from tests.conftest import why_no_gpu

ROOT = Path(__file__).resolve().parents[3]
PLANES = {"fp16": "to_image_fp16_planes", "bf16": "to_image_bf16_planes"}


def environment(**changes: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")} | changes


def cli(*arguments: str | Path, cwd: Path = ROOT, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "kernels", *map(str, arguments)], cwd=cwd, env=environment(**changes),
                          capture_output=True, text=True, timeout=600)


def build(output: Path, cache: Path, *arguments: str, cwd: Path = ROOT) -> dict[str, Any]:
    done = cli("build", "-o", output, "--cache", cache, "-j", "1", "--json", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def contents(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """to_image for two architectures."""
    output = tmp_path_factory.mktemp("built")
    report = build(output, cache, "--op", "to_image", "--arch", "sm_75,sm_90")
    assert (report["compiled"], report["cached"], report["artefacts"], report["unfit"]) == (10, 0, 10, [])
    return output


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """`built` once more, to spoil."""
    return shutil.copytree(built, tmp_path / "copy")


def test_architectures_are_the_same_everywhere() -> None:
    assert tuple(aot.MAX_SHARED) == ARCHS


def test_every_variant_is_built_where_its_dtype_runs(built: Path) -> None:
    layouts = ("interleaved", "planes")
    assert [(a.arch, a.name) for a in artefacts(built)] == [
        (arch, f"to_image_{dtype}_{layout}") for arch, dtypes in (("sm_75", ("fp16", "fp32")),
                                                                  ("sm_90", ("bf16", "fp16", "fp32")))
        for dtype in dtypes for layout in layouts]


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


def test_a_second_build_compiles_and_writes_nothing(built: Path, cache: Path) -> None:
    before = {f: f.stat().st_mtime_ns for f in built.rglob("*.*") if f.name != ".lock"}
    report = build(built, cache, "--op", "to_image", "--arch", "sm_75,sm_90")
    assert (report["compiled"], report["cached"]) == (0, 10)
    assert {f: f.stat().st_mtime_ns for f in built.rglob("*.*") if f.name != ".lock"} == before


def test_a_build_removes_what_it_no_longer_makes_and_nothing_else(copy: Path, cache: Path) -> None:
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
def test_a_large_kernel_assembles_to_the_same_bytes(tmp_path: Path) -> None:
    """ptxas by itself makes others of this one from run to run, and with other paths and limits."""
    ptx = tmp_path / "attention.ptx"
    run_python("from pathlib import Path\nfrom kernels import aot\n"
               "variant = aot.variants_of('attention')['attention_fp32_d80_64x32_tf32x3_w8_s2']\n"
               f"Path({str(ptx)!r}).write_bytes(aot.compile_variant(variant, 90)[1]['ptx'])")
    code = ("import hashlib, pathlib, resource, sys, tempfile\nfrom kernels import assemble\n"
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
def test_a_change_in_what_a_kernel_calls_is_compiled_again(built: Path, cache: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "kernels" / "to_image.py"
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


@pytest.mark.slow
def test_a_kernel_that_does_not_fit_is_left_out(tmp_path: Path) -> None:
    """Here a GPU of 1 kB, on which the smallest of guidance_step needs no more; compiled without other processes."""
    report = run_python(f"""
from pathlib import Path
from kernels import aot
aot.MAX_SHARED[90] = 1024
def compile_here(jobs, cache, processes):
    for job in jobs:
        aot._store(cache, job.key, aot._work(job.variant.op, job.variant.name, job.arch,
                                             job.variant.kernel.cache_key))
aot._compile_all = compile_here
built = aot.build(Path({str(tmp_path / "out")!r}), archs=[90], ops=["guidance_step"], cache=Path({str(tmp_path)!r}))
print(*(a.name for a in built.artefacts), "|", *(a.name for a in built.unfit))
""")
    fit, unfit = (part.split() for part in report.split("|"))
    assert fit == [f"guidance_step_{dtype}_memory7" for dtype in ("fp16", "bf16", "fp32")]
    assert [a.name for a in artefacts(tmp_path / "out")] == sorted(fit)
    assert len(unfit) == 6


def test_a_damaged_artefact_says_how_to_build_it_again(copy: Path) -> None:
    artefact = Artefact.read(copy, PLANES["fp16"], "sm_90")
    file = copy / "sm_90" / artefact.files["cubin"]
    file.write_bytes(file.read_bytes()[:-1])
    again = re.escape(f"build it again: python -m kernels build --arch sm_90 -o {copy}")
    with pytest.raises(KernelError, match=rf"is damaged; {again}"):
        artefact.code("cubin")
    file.unlink()
    with pytest.raises(KernelError, match=rf"cannot be read .*{again}"):
        artefact.code("cubin")


def test_a_kernel_that_was_not_built_says_where_there_is_one(built: Path) -> None:
    with pytest.raises(KernelError, match=r"no such kernel.*there is sm_90; build it: python -m kernels build"):
        Artefact.read(built, PLANES["bf16"], "sm_75")
    with pytest.raises(KernelError, match="there is none for any architecture"):
        Artefact.read(built, "to_image_fp64", "sm_75")


@pytest.mark.parametrize(("change", "message"), [
    ({"format": 2}, "got format 2, this version reads up to 1"), ({"color": "red"}, "got the keys"),
    ({"arguments": 3}, "not a readable"), (None, "not a readable")], ids=["newer", "unknown key", "wrong type", "cut"])
def test_a_signature_that_cannot_be_read_is_refused(copy: Path, change: dict[str, Any] | None, message: str) -> None:
    path = copy / "sm_90" / f"{PLANES['fp16']}.json"
    text = path.read_text()
    path.write_text(text[:100] if change is None else json.dumps(json.loads(text) | change))
    with pytest.raises(KernelError, match=message):
        Artefact.read(copy, PLANES["fp16"], "sm_90")


def test_signatures_round_trip(built: Path) -> None:
    for artefact in artefacts(built):
        path = artefact.directory / f"{artefact.name}.json"
        again = Artefact.from_json(json.loads(json.dumps(artefact.to_json())), path)
        assert again == artefact
        assert again.directory == path.parent


@pytest.mark.parametrize(("capability", "arch"), [(75, "sm_75"), (80, "sm_80"), (87, "sm_86"), (89, "sm_89"),
                                                  (90, "sm_90"), (100, "sm_100"), (120, "sm_120")])
def test_a_gpu_runs_the_code_of_its_architecture(capability: int, arch: str) -> None:
    assert arch_for(capability) == arch


@pytest.mark.parametrize("capability", [61, 70, 103, 110, 121])
def test_a_gpu_that_no_code_runs_on_is_refused(capability: int) -> None:
    with pytest.raises(KernelError, match=f"got {capability / 10:.1f}, expected one of 7.5, 8.0"):
        arch_for(capability)


def test_reading_and_launching_load_neither_torch_nor_triton() -> None:
    loaded = run_python("import sys, kernels.aot.artefact, kernels.launch, kernels.host.step_table, kernels.aot.build\n"
                        "print(sorted({name.partition('.')[0] for name in sys.modules}))")
    assert "'numpy'" in loaded
    assert not {"'torch'", "'triton'", "'cuda'"} & set(re.findall(r"'\w+'", loaded))


def test_launching_without_cuda_core_says_what_to_install(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.launch import Kernel

    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(KernelError, match=r"needs cuda.core .* pip install 'cuda-core"):
        Kernel(Artefact.read(built, PLANES["fp16"], "sm_90"))


def test_interpreted_kernels_are_not_built(tmp_path: Path) -> None:
    done = cli("build", "--op", "to_image", "--arch", "sm_90", "-o", tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: got kernels that Triton interprets")
    assert "unset TRITON_INTERPRET" in done.stderr


@pytest.mark.parametrize(("arguments", "message"), [
    (("--arch", "sm_90,sm_91"), "got 'sm_91', expected some of sm_75,sm_80"),
    (("--op", "softmax"), "got softmax, expected some of attention"),
    (("-j", "0"), "got '0', expected a whole number of at least 1")], ids=["arch", "op", "jobs"])
def test_options_that_cannot_be_are_refused(arguments: tuple[str, ...], message: str) -> None:
    done = cli("build", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_every_op_has_variants_that_fit_their_kernels() -> None:
    """Listing them compares names, types and constants of each with the arguments of its kernel."""
    done = cli("list", "--json")
    assert done.returncode == 0, done.stderr
    assert {variant["op"] for variant in json.loads(done.stdout)} == set(aot.OPS)


def test_list_shows_what_was_built(built: Path) -> None:
    done = cli("list", built, "--json")
    assert done.returncode == 0, done.stderr
    assert [a["name"] for a in json.loads(done.stdout)] == [a.name for a in artefacts(built)]
    table = cli("list", built, "--op", "to_image").stdout.splitlines()
    assert table[0].split() == ["arch", "name", "entry", "threads", "shared", "cubin"]
    assert len(table) == 1 + len(list(artefacts(built)))


@pytest.fixture(scope="module")
def for_this_gpu(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """guidance_step and to_image for the GPU that is here."""
    import torch

    if reason := why_no_gpu():
        pytest.skip(reason)
    pytest.importorskip("cuda.core", reason="cuda.core is not installed")
    major, minor = torch.cuda.get_device_capability()
    output, arch = tmp_path_factory.mktemp("gpu"), arch_for(10 * major + minor)
    build(output, tmp_path_factory.mktemp("gpu-cache"), "--op", "guidance_step,to_image", "--arch", arch)
    return output, arch


def enqueue_and_wait(enqueue: Any) -> None:
    import torch

    torch.cuda.synchronize()
    stream = pytest.importorskip("cuda.core").Device().create_stream()
    enqueue(stream)
    stream.sync()


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["planes", "interleaved"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_the_cubin_of_to_image_gives_the_bytes_of_its_reference(for_this_gpu: tuple[Path, str], dtype: str,
                                                                layout: str) -> None:
    import torch

    from kernels.launch import Kernel
    from kernels.triton import to_image

    artefact = Artefact.read(for_this_gpu[0], f"to_image_{dtype}_{layout}", for_this_gpu[1])
    x = torch.randn(2, 3, 96, 80, generator=torch.Generator().manual_seed(2))
    x = x.to("cuda", {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    out = torch.full((2, 96, 80, 3), 77, dtype=torch.uint8, device="cuda")
    block = int(artefact.constants["BLOCK"])
    grid: tuple[int, ...] = (-(-96 * 80 // (4 * block)), 2)
    size = {"pixels": 96 * 80}
    if layout == "interleaved":
        x = x.contiguous(memory_format=torch.channels_last)
        grid, size = (-(-x.numel() // block),), {"values": x.numel()}
    enqueue_and_wait(Kernel(artefact).bind(grid, x_ptr=x.data_ptr(), out_ptr=out.data_ptr(), **size))
    assert torch.equal(out.cpu(), to_image.reference(x.cpu()))


@pytest.mark.gpu
@pytest.mark.parametrize("memory", [1, 3, 7])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_the_cubin_of_guidance_step_matches_its_reference(for_this_gpu: tuple[Path, str], dtype: str,
                                                          memory: int) -> None:
    from kernels.launch import Kernel
    from tests.kernels.triton.test_guidance_step import check_against_reference, copied, random_arguments

    artefact = Artefact.read(for_this_gpu[0], f"guidance_step_{dtype}_memory{memory}", for_this_gpu[1])
    arguments = random_arguments(images=2, memory=memory, latent=(4, 64, 64), dtype=dtype)
    run = copied(arguments)
    n, images = 4 * 64 * 64, len(run["state"])
    pointers = {f"{name}_ptr": tensor.data_ptr() for name, tensor in run.items()}
    enqueue_and_wait(Kernel(artefact).bind((-(-n // int(artefact.constants["BLOCK"])), images), **pointers, n=n,
                                           first=images, rows=run["table"].shape[1], draws=run["noise"].shape[1]))
    check_against_reference(arguments, run)


@pytest.mark.gpu
def test_arguments_that_do_not_fit_the_artefact_are_refused(for_this_gpu: tuple[Path, str]) -> None:
    from kernels.launch import Kernel

    artefact = Artefact.read(for_this_gpu[0], PLANES["fp16"], for_this_gpu[1])
    kernel = Kernel(artefact)
    with pytest.raises(KernelError, match=r"got arguments .* expected"):
        kernel.bind((1,), x_ptr=0, out_ptr=0)
    with pytest.raises(KernelError, match="pixels: got 20, expected a multiple of 16"):
        kernel.bind((1,), x_ptr=0, out_ptr=0, pixels=20)
    other = "sm_80" if for_this_gpu[1] != "sm_80" else "sm_90"
    with pytest.raises(KernelError, match=f"got code for {other}, expected {for_this_gpu[1]}"):
        Kernel(dataclasses.replace(artefact, arch=other))
