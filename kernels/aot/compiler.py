"""The compiler compiles a variant for an architecture, or many in processes of their own, without a GPU.

Triton lowers a kernel to PTX, and the ptxas of its own wheel makes the cubin (`assemble.py`). The same input gives the
same bytes.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from kernels.aot import assemble, cache
from kernels.aot.artefact import SCRATCH, Artefact, KernelError
from kernels.aot.plan import MAX_SHARED, Compilation, options, target, triton_version, variants_of
from kernels.aot.variant import Variant

PTX_TYPES = {"i32": "u32", "i64": "u64", "fp32": "f32"}


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
    compiled = triton.compile(source, target=target(arch), options=options(variant))
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
        num_warps=variant.num_warps, num_stages=variant.num_stages, triton=triton_version(),
        source=variant.kernel.cache_key, files=files, hashes=hashes), code


def _check_ptx(what: str, ptx: str, entry: str, arguments: Sequence[tuple[str, str]], block: tuple[int, ...]) -> None:
    """Raise KernelError unless the entry of the PTX takes `arguments` and `block` threads."""
    found = re.search(rf"\.entry {re.escape(entry)}\((.*?)\)\s*\.reqntid (\d+)", ptx, re.DOTALL)
    types = [] if found is None else re.findall(r"\.param \.(\w+)", found[1])
    expected = ["u64" if kind.startswith("*") else PTX_TYPES.get(kind, kind) for _, kind in arguments]
    if found is None or types != expected or int(found[2]) != block[0]:
        raise KernelError(f"{what}: got PTX whose entry takes {types} in blocks of {found and found[2]}, expected "
                          f"{expected} in blocks of {block[0]}; this version of Triton appends other arguments")


def compile_all(compilations: Sequence[Compilation], store: Path, processes: int) -> None:
    """Compile in so many processes at a time, each result into the cache `store` as it comes.

    On Ctrl-C or an error the processes end, and what they had finished stays. Raises KernelError.
    """
    from tqdm import tqdm

    before = set(multiprocessing.active_children())
    scratch = tempfile.mkdtemp(prefix="latentrt-kernels-")
    pool = ProcessPoolExecutor(min(processes, len(compilations)), multiprocessing.get_context("spawn"), _start_worker,
                               (scratch,))
    try:
        with _without_interrupts():
            running = {pool.submit(compile_entry, c.variant.op, c.variant.name, c.arch, c.variant.kernel.cache_key): c
                       for c in compilations}
        with tqdm(total=len(compilations), desc="compile kernels", unit="kernel", disable=None) as bar:
            for done in as_completed(running):
                compilation = running[done]
                try:
                    entry = done.result()
                except BrokenProcessPool as e:
                    raise KernelError("a process that compiles was killed, expected it to finish; if memory is short, "
                                      "build again with fewer processes (-j)") from e
                except Exception as e:
                    raise KernelError(f"{compilation.variant.name} for sm_{compilation.arch}: could not be compiled: "
                                      f"{e}") from e
                cache.write(store, compilation.key, entry)
                bar.update()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()  # a worker that is compiling would keep Ctrl-C waiting; one that is idle loses nothing
        shutil.rmtree(scratch, ignore_errors=True)


def compile_entry(op: str, name: str, arch: int, source: str) -> bytes:
    """Compile the variant `name` of `op`, whose source has the hash `source`; returns its entry of the cache.

    Raises KernelError where the file of the op has changed since that hash was taken.
    """
    variant = variants_of(op)[name]
    if variant.kernel.cache_key != source:
        raise KernelError(f"kernels/triton/{op}.py changed meanwhile; build again")
    return cache.pack(*compile_variant(variant, arch))


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that start in here never see Ctrl-C, which is for their parent to act on; it sees it at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(scratch: str) -> None:
    """Prepare a new process: keep every temporary file in `scratch`, and the names of files out of the code."""
    from triton import knobs

    assemble.fix_addresses()
    tempfile.tempdir = scratch
    knobs.runtime.add_stages_inspection_hook = assemble.use
    knobs.cache.dir = scratch
    knobs.compilation.always_compile = True
    knobs.compilation.disable_line_info = True
