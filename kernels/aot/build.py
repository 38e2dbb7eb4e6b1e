"""Ahead-of-time build: every variant of every op, for every GPU architecture, on a machine without a GPU.

Triton lowers a kernel to PTX, and the ptxas of its own wheel makes the cubin (`assemble.py`). What comes out depends on
the kernel's source (with all that it calls), its types, constants and options, the architecture, and the compilers'
versions: their hash is the name in the cache. The same input gives the same bytes; no line or file names go in.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib
import io
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.aot import assemble
from kernels.aot.artefact import ARCHS, FORMAT, SCRATCH, Artefact, KernelError
from kernels.aot.variant import Variant

OPS = ("attention", "group_norm", "layer_norm", "geglu", "step_input", "accumulate", "guidance_step", "to_image")

MAX_SHARED = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes of shared memory that one block can have (CUDA C++ Programming Guide, technical specifications)."""

PTX_TYPES = {"i32": "u32", "i64": "u64", "fp32": "f32"}

CODE_NAME = re.compile(r".+\.[0-9a-f]{12}\.(cubin|ptx)")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One variant for one architecture; key: hash of everything that its code depends on."""

    variant: Variant
    arch: int
    key: str


@dataclass(frozen=True)
class Built:
    """What a build did.

    artefacts: what is in its output now. unfit: those that need more shared memory than one block of their architecture
    has; a launcher does not choose them there, so they are left out. compiled, cached: where all of them came from.
    """

    artefacts: tuple[Artefact, ...]
    unfit: tuple[Artefact, ...]
    compiled: int
    cached: int


def build(output: Path, *, archs: Sequence[int] = ARCHS, ops: Sequence[str] = OPS, cache: Path | None = None,
          processes: int = 0) -> Built:
    """Compile what the cache does not have, then write all artefacts of `ops` for `archs` below `output`.

    cache: directory, by default ~/.cache/latentrt/kernels. processes: at a time, 0 for one per CPU. On Ctrl-C or an
    error the kernels that are finished stay in the cache, and every artefact in `output` is whole. Raises KernelError.
    """
    cache = cache or default_cache()
    jobs = plan(archs, ops)
    missing = [job for job in jobs if _cached(cache, job.key) is None]
    log.info("%d artefacts, %d of them to compile", len(jobs), len(missing))
    try:
        if missing:
            _compile_all(missing, cache, processes or _cpus())
        made = _publish(jobs, cache, output)
        fit, unfit = tuple(a for a in made if a.files), tuple(a for a in made if not a.files)
        return Built(fit, unfit, len(missing), len(jobs) - len(missing))
    except OSError as e:
        raise KernelError(f"could not write: {e}; make room, or choose another -o or --cache") from e


def plan(archs: Sequence[int] = ARCHS, ops: Sequence[str] = OPS) -> list[Job]:
    """Every variant of `ops` for those of `archs` that it runs on. Raises KernelError."""
    if unknown := [arch for arch in archs if arch not in ARCHS]:
        raise KernelError(f"arch: got {unknown}, expected some of {', '.join(map(str, ARCHS))}; "
                          "GPUs in between run the code of the one before (8.7: sm_86)")
    chosen = [variant for op in ops for variant in variants_of(op).values()]
    return [Job(variant, arch, key(variant, arch)) for variant in chosen for arch in archs if arch in variant.archs]


@functools.cache
def variants_of(op: str) -> Mapping[str, Variant]:
    """The variants of one op by name. Raises KernelError for an unknown op or kernels that cannot be compiled."""
    if op not in OPS:
        raise KernelError(f"op: got {op!r}, expected one of {', '.join(OPS)}")
    try:
        import triton

        module = importlib.import_module(f"kernels.triton.{op}")
    except ModuleNotFoundError as e:
        if e.name not in ("torch", "triton"):
            raise
        raise KernelError(f"building kernels needs torch and triton ({e}); pip install torch triton") from e
    found: dict[str, Variant] = {}
    for variant in module.variants():
        if not variant.name.startswith(f"{op}_") or variant.name in found:
            raise KernelError(f"{variant.name}: got a name that is taken or not of {op}, expected {op}_ and what tells "
                              "it from the others; correct its variants()")
        if not isinstance(variant.kernel, triton.JITFunction):
            raise KernelError("got kernels that Triton interprets, expected ones that it compiles; unset "
                              "TRITON_INTERPRET and start again")
        given = [*variant.signature, *variant.constants]
        if sorted(given) != sorted(variant.kernel.arg_names) or not {*variant.divisible} <= {*variant.signature}:
            raise KernelError(f"{variant.name}: got signature and constants for {given}, expected {op}'s arguments "
                              f"{variant.kernel.arg_names}; correct its variants()")
        found[variant.name] = variant
    return found


def key(variant: Variant, arch: int) -> str:
    """sha256 of everything that the code of `variant` for `arch` depends on."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler import make_backend

    backend = make_backend(_target(arch))
    material = {
        "format": FORMAT, "op": variant.op, "name": variant.name, "source": variant.kernel.cache_key,
        "signature": list(variant.signature.items()), "constants": dict(variant.constants),
        "divisible": variant.divisible, "arch": arch, "shared": MAX_SHARED[arch], "triton": _triton_version(),
        "ptxas": backend.hash(), "assembled": assemble.VERSION, "environment": get_cache_invalidating_env_vars(),
        "options": backend.parse_options(_options(variant)).hash(),
    }
    return hashlib.sha256(json.dumps(material, sort_keys=True).encode()).hexdigest()


def compile_variant(variant: Variant, arch: int) -> tuple[Artefact, Mapping[str, bytes]]:
    """Compile one variant: its signature, and the bytes of "ptx" and "cubin", or none where they do not fit the GPU.

    Raises KernelError where the code asks for scratch memory, or for other arguments or threads than expected.
    """
    import triton
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    types = {name: variant.signature.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible}
    source = ASTSource(variant.kernel, types, dict(variant.constants), aligned)
    compiled = triton.compile(source, target=_target(arch), options=_options(variant))
    made = compiled.metadata
    code = {"cubin": bytes(compiled.asm["cubin"]), "ptx": compiled.asm["ptx"].encode()}
    what = f"{variant.name} for sm_{arch}"
    for scratch in (made.global_scratch_size, made.profile_scratch_size):
        if scratch:
            raise KernelError(f"{what}: got {scratch} bytes of scratch memory, expected none, for nobody allocates it; "
                              "do not make descriptors or profile inside the kernel")
    arguments = (*((name, kind) for name, kind in types.items() if kind != "constexpr"), *SCRATCH)
    block = (32 * made.num_warps, 1, 1)
    _check_ptx(what, compiled.asm["ptx"], made.name, arguments, block)
    if made.shared > MAX_SHARED[arch]:
        code = {}
    hashes = {kind: hashlib.sha256(data).hexdigest() for kind, data in code.items()}
    files = {kind: f"{variant.name}.{digest[:12]}.{kind}" for kind, digest in hashes.items()}
    return Artefact(
        op=variant.op, name=variant.name, arch=f"sm_{arch}", entry=made.name, arguments=arguments,
        constants=dict(variant.constants), divisible=variant.divisible, block=block, shared=made.shared,
        num_warps=variant.num_warps, num_stages=variant.num_stages, triton=_triton_version(),
        source=variant.kernel.cache_key, files=files, hashes=hashes), code


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentrt" / "kernels"


def _check_ptx(what: str, ptx: str, entry: str, arguments: Sequence[tuple[str, str]], block: tuple[int, ...]) -> None:
    """Raise KernelError unless the entry of the PTX takes `arguments` and `block` threads."""
    found = re.search(rf"\.entry {re.escape(entry)}\((.*?)\)\s*\.reqntid (\d+)", ptx, re.DOTALL)
    types = [] if found is None else re.findall(r"\.param \.(\w+)", found[1])
    expected = ["u64" if kind.startswith("*") else PTX_TYPES.get(kind, kind) for _, kind in arguments]
    if found is None or types != expected or int(found[2]) != block[0]:
        raise KernelError(f"{what}: got PTX whose entry takes {types} in blocks of {found and found[2]}, expected "
                          f"{expected} in blocks of {block[0]}; this version of Triton appends other arguments")


def _target(arch: int) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", arch, 32)


def _options(variant: Variant) -> dict[str, int]:
    return {"num_warps": variant.num_warps, "num_stages": variant.num_stages}


def _triton_version() -> str:
    import triton

    return triton.__version__


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _compile_all(jobs: Sequence[Job], cache: Path, processes: int) -> None:
    """Compile `jobs` in processes of their own, each result into the cache as it comes."""
    from tqdm import tqdm

    before = set(multiprocessing.active_children())
    scratch = tempfile.mkdtemp(prefix="latentrt-kernels-")
    pool = ProcessPoolExecutor(min(processes, len(jobs)), multiprocessing.get_context("spawn"), _start_worker,
                               (scratch,))
    try:
        with _without_interrupts():
            running = {pool.submit(_work, job.variant.op, job.variant.name, job.arch, job.variant.kernel.cache_key): job
                       for job in jobs}
        with tqdm(total=len(jobs), desc="compile kernels", unit="kernel", disable=None) as bar:
            for done in as_completed(running):
                job = running[done]
                try:
                    entry = done.result()
                except BrokenProcessPool as e:
                    raise KernelError("a process that compiles was killed, expected it to finish; if memory is short, "
                                      "build again with fewer processes (-j)") from e
                except Exception as e:
                    raise KernelError(f"{job.variant.name} for sm_{job.arch}: could not be compiled: {e}") from e
                _store(cache, job.key, entry)
                bar.update()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()  # a worker that is compiling would keep Ctrl-C waiting; one that is idle loses nothing
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that start in here never see Ctrl-C, which is for their parent to act on; it sees it at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(scratch: str) -> None:
    """In a new process: keep every temporary file in `scratch`, and the names of files out of the code."""
    from triton import knobs

    assemble.fix_addresses()
    tempfile.tempdir = scratch
    knobs.runtime.add_stages_inspection_hook = assemble.use
    knobs.cache.dir = scratch
    knobs.compilation.always_compile = True
    knobs.compilation.disable_line_info = True


def _work(op: str, name: str, arch: int, source: str) -> bytes:
    """Compile one variant whose source has this hash; returns its entry of the cache."""
    if variants_of(op)[name].kernel.cache_key != source:
        raise KernelError(f"kernels/{op}.py changed meanwhile; build again")
    return _archive(*compile_variant(variants_of(op)[name], arch))


def compile_site(variant: Variant, arch: int, cache: Path | None = None) -> tuple[Artefact, bytes]:
    """One variant that `plan` does not know, compiled in this process where the cache does not have it.

    Returns its signature, and its PTX: none where it needs more shared memory than a block of `arch` has. Raises
    KernelError where it cannot be compiled.
    """
    import triton
    from triton import knobs

    if arch not in ARCHS or not isinstance(variant.kernel, triton.JITFunction):
        raise KernelError(f"{variant.name}: got sm_{arch} and {type(variant.kernel).__name__}, expected one of "
                          f"{', '.join(map(str, ARCHS))} and a kernel that Triton compiles; unset TRITON_INTERPRET")
    cache, digest = cache or default_cache(), key(variant, arch)
    if (entry := _cached(cache, digest)) is None:
        with knobs.compilation.scope():
            knobs.compilation.disable_line_info = True
            try:
                _store(cache, digest, _archive(*compile_variant(variant, arch)))
            except (RuntimeError, ValueError, triton.CompilationError) as e:  # the compiler's, or a KernelError
                raise KernelError(f"{variant.name} for sm_{arch}: could not be compiled: {e}") from e
        entry = _cached(cache, digest)
    if entry is None:
        raise KernelError(f"{_entry(cache, digest)} vanished while building; build again")
    artefact = Artefact.from_json(json.loads(entry["signature.json"]), _entry(cache, digest))
    return artefact, entry.get("ptx", b"")


def _archive(artefact: Artefact, code: Mapping[str, bytes]) -> bytes:
    """The entry of the cache for what `compile_variant` made."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("signature.json", json.dumps(artefact.to_json(), indent=1) + "\n")
        for kind, data in code.items():
            archive.writestr(kind, data)
    return file.getvalue()


def _store(cache: Path, digest: str, entry: bytes) -> None:
    path = _entry(cache, digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, entry)


def _entry(cache: Path, digest: str) -> Path:
    return cache / digest[:2] / f"{digest}.zip"


def _cached(cache: Path, digest: str) -> Mapping[str, bytes] | None:
    """The files of a cache entry, each with its checksum verified, or None where there is none or it is damaged."""
    try:
        with zipfile.ZipFile(_entry(cache, digest)) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def _write(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, then rename, so that readers and other writers see all of it or nothing."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _publish(jobs: Iterable[Job], cache: Path, output: Path) -> tuple[Artefact, ...]:
    """Write the artefacts of `jobs` below `output`, each with its signature last, then remove what those replaced."""
    made = []
    with _lock(output):
        for job in jobs:
            entry = _cached(cache, job.key)
            if entry is None:
                raise KernelError(f"{_entry(cache, job.key)} vanished while building; build again")
            signature = output / f"sm_{job.arch}" / f"{job.variant.name}.json"
            signature.parent.mkdir(exist_ok=True)
            artefact = Artefact.from_json(json.loads(entry["signature.json"]), signature)
            for kind, file in artefact.files.items():
                _write_changed(signature.parent / file, entry[kind])
            if artefact.files:
                _write_changed(signature, entry["signature.json"])
            made.append(artefact)
        _tidy(made)
    return tuple(made)


def _tidy(made: Sequence[Artefact]) -> None:
    """Remove artefacts of the same ops and architectures that are no longer made, and code that none refers to."""
    ours = {(a.directory, a.name) for a in made if a.files}
    ops = {a.op for a in made}
    for directory in {a.directory for a in made}:
        used = set()
        for file in directory.glob("*.json"):
            try:
                artefact = Artefact.read(directory.parent, file.stem, directory.name)
            except KernelError:
                continue
            if artefact.op in ops and (directory, artefact.name) not in ours:
                file.unlink()
            else:
                used |= set(artefact.files.values())
        for file in directory.iterdir():
            if CODE_NAME.fullmatch(file.name) and file.name not in used:
                file.unlink()


def _write_changed(path: Path, data: bytes) -> None:
    if not path.is_file() or path.read_bytes() != data:
        _write(path, data)


@contextmanager
def _lock(output: Path) -> Iterator[None]:
    """One writer of `output` at a time; the others wait. The system gives it back when a writer is killed."""
    output.mkdir(parents=True, exist_ok=True)
    with open(output / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
