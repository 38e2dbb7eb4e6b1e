"""Kernels as nodes of another compiler's graph: pointers are their only arguments, all else is compiled in.

TensorRT's ahead-of-time plugins launch a kernel with the addresses of its inputs, 32-bit integers, and the addresses of
its outputs; it takes no floats and knows nothing of the scratch pointers that Triton appends. For a static shape there
is nothing else to hand over: sizes, strides, scale and epsilon become constants of the code, one piece of code a shape.
Importing this file needs neither torch nor triton; using it needs both, and no GPU.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.aot import cache as entries
from kernels.aot.artefact import ARCHS, SCRATCH, Artefact, KernelError
from kernels.aot.compiler import compile_variant
from kernels.aot.plan import MAX_SHARED, key, needs_triton
from kernels.aot.variant import Launch, Variant


@dataclass(frozen=True)
class Tensor:
    """Shape and dtype ("fp16", "bf16" or "fp32") of a tensor whose memory has no gaps."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Code:
    """What it takes to launch one kernel: PTX, the symbol in it, programs, threads, and bytes of shared memory."""

    entry: str
    ptx: bytes
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int


def attention(q: Tensor, k: Tensor, v: Tensor, arch: int, *, scale: float | None = None,
              causal: bool = False) -> tuple[Launch, ...]:
    """Return launches of which any one computes `kernels.triton.attention`, the best first, then smaller ones.

    Smaller ones need less shared memory. Tensors are [batch, tokens, heads, head dim]. Pointers: q, k, v, out. Raises
    KernelError for what it cannot do.
    """
    with needs_triton():
        from kernels.triton import attention as op

    _check(lambda: op.check(_meta(q), _meta(k), _meta(v), scale, causal), q.dtype, arch)
    batch, n_q, heads, head_dim = q.shape
    best = op.config(batch, heads, n_q, k.shape[1], head_dim, q.dtype, arch)
    smaller = [dataclasses.replace(best, block_m=m, block_n=n, num_warps=4, num_stages=stages)
               for m, n, stages in ((64, 32, 2), (32, 32, 1), (16, 16, 1)) if m * n < best.block_m * best.block_n]
    strides = [(t.shape[1] * heads * head_dim, heads * head_dim, head_dim) for t in (q, k, v)]
    return tuple(op.plan(cfg, q.shape, k.shape[1], strides, scale, causal) for cfg in (best, *smaller))


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, arch: int, *, groups: int, eps: float, silu: bool,
               channels_last: bool) -> tuple[Launch, ...]:
    """Return the launches that compute `kernels.triton.group_norm` one after another: one, or statistics and the rest.

    x is [images, channels, …] whichever way it lies in memory. Pointers: x, weight, bias, out; or (x, parts) and
    (x, weight, bias, parts, out), parts being of `parts_shape`. Raises KernelError for what it cannot do.
    """
    with needs_triton():
        from kernels.triton import group_norm as op

    _check(lambda: op.check(_meta(x), _meta(weight), _meta(bias), groups), x.dtype, arch)
    return op.plan(x.shape[0], math.prod(x.shape[2:]), x.shape[1], groups, eps, silu, channels_last)


def parts_shape(x: Tensor, groups: int, statistics: Launch) -> tuple[int, ...]:
    """Return the shape of the statistics of a split group norm, which are float32."""
    with needs_triton():
        from kernels.triton import group_norm as op

    return op.parts_shape(x.shape[0], groups, statistics)


def variant(op: str, launch: Launch, pointers: Mapping[str, str]) -> Variant:
    """Return `launch` with everything but its pointers compiled in; pointers: name → dtype, in the kernel's order."""
    constants = {**launch.scalars, **launch.constants}
    facts = [launch.kernel.__name__, constants, dict(pointers), launch.num_warps, launch.num_stages]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return Variant(op=op, name=f"{op}_site_{digest}", kernel=launch.kernel, constants=constants,
                   signature={name: f"*{dtype}" for name, dtype in pointers.items()}, divisible=tuple(pointers),
                   num_warps=launch.num_warps, num_stages=launch.num_stages)


def compile_any(op: str, launches: Sequence[Launch], inputs: Mapping[str, str], outputs: Mapping[str, str], arch: int,
                max_shared: int | None = None, cache: Path | None = None) -> Code:
    """Return the code of the first of `launches` that fits; it takes `inputs` and then `outputs` (name → dtype).

    max_shared: the most bytes of shared memory a launch may need, by default what a block of `arch` can have. Raises
    KernelError where none fits or the kernel takes its arguments in another order.
    """
    pointers = {**inputs, **outputs}
    needed = []
    for launch in launches:
        artefact, ptx = _compiled(variant(op, launch, pointers), arch, cache)
        needed.append(artefact.shared)
        if artefact.files and artefact.shared <= (max_shared or MAX_SHARED[arch]):
            _check_order(artefact, inputs, outputs)
            return Code(artefact.entry, without_scratch(ptx, artefact), launch.grid, artefact.block, artefact.shared)
    raise KernelError(f"{op}: got launches of {', '.join(map(str, needed))} bytes of shared memory, expected at most "
                      f"{max_shared or MAX_SHARED[arch]} on sm_{arch}; leave this site to the engine's own kernel")


def without_scratch(ptx: bytes, artefact: Artefact) -> bytes:
    """Return the PTX of `artefact` without the scratch pointers in the parameters of its entry.

    Raises KernelError where the code reads them.
    """
    text = ptx.decode()
    keep = len(artefact.arguments) - len(SCRATCH)
    entry = re.search(rf"(?<=\.entry {re.escape(artefact.entry)}\()(.*?)(?=\n\))", text, re.DOTALL)
    parameters = entry[1].split(",") if entry else []
    dropped = [parameter.split()[-1] for parameter in parameters[keep:]]
    if entry is None or len(dropped) != len(SCRATCH) or any(len(re.findall(rf"\b{d}\b", text)) != 1 for d in dropped):
        raise KernelError(f"{artefact.name}: got PTX whose entry takes {len(parameters)} parameters and uses "
                          f"{dropped}, expected {keep} and {len(SCRATCH)} unused ones; use Triton 3.6")
    return (text[:entry.start()] + ",".join(parameters[:keep]) + text[entry.end():]).encode()


def _compiled(variant: Variant, arch: int, cache: Path | None) -> tuple[Artefact, bytes]:
    """Compile a variant that no op lists, in this process, where the cache does not have it.

    Returns its signature, and its PTX: none where it needs more shared memory than a block of `arch` has. Raises
    KernelError where it cannot be compiled.
    """
    import triton
    from triton import knobs

    if arch not in ARCHS or not isinstance(variant.kernel, triton.JITFunction):
        raise KernelError(f"{variant.name}: got sm_{arch} and {type(variant.kernel).__name__}, expected one of "
                          f"{', '.join(map(str, ARCHS))} and a kernel that Triton compiles; unset TRITON_INTERPRET")
    cache, digest = cache or entries.default(), key(variant, arch)
    if entries.find(cache, digest) is None:
        with knobs.compilation.scope():
            knobs.compilation.disable_line_info = True
            try:
                entries.write(cache, digest, entries.pack(*compile_variant(variant, arch)))
            except (RuntimeError, ValueError, triton.CompilationError) as e:  # the compiler's, or a KernelError
                raise KernelError(f"{variant.name} for sm_{arch}: could not be compiled: {e}") from e
    entry = entries.read(cache, digest)
    artefact = Artefact.from_json(json.loads(entry[entries.SIGNATURE]), entries.path_of(cache, digest))
    return artefact, entry.get("ptx", b"")


def _check_order(artefact: Artefact, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
    expected = (*((name, f"*{dtype}") for name, dtype in (*inputs.items(), *outputs.items())), *SCRATCH)
    if artefact.arguments != expected:
        raise KernelError(f"{artefact.name}: got arguments {artefact.arguments}, expected {expected}: the inputs, then "
                          "the outputs")


def _meta(tensor: Tensor) -> Any:
    import torch

    from kernels.triton.checks import DTYPES

    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    if tensor.dtype not in dtypes:
        raise KernelError(f"got dtype {tensor.dtype}, expected one of {', '.join(dtypes)}")
    return torch.empty(tensor.shape, dtype=dtypes[tensor.dtype], device="meta")


def _check(check: Callable[[], None], dtype: str, arch: int) -> None:
    from kernels.triton.checks import OLDEST

    try:
        check()
    except (TypeError, ValueError) as e:
        raise KernelError(str(e)) from e
    if arch < OLDEST[dtype]:
        raise KernelError(f"got {dtype} on sm_{arch}, expected sm_{OLDEST[dtype]} or later")
