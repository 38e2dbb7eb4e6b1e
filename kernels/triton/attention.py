"""Attention: out = softmax(scale · q kᵀ) v for every batch entry and head, optionally causal.

Flash attention (Dao, "FlashAttention-2", 2023): one pass over blocks of keys with scores s, and a running maximum m,
sum l and output o of every row,

    m' = max(m, scale · max(s))                p = exp2(scale · s − m')
    l' = l · exp2(m − m') + sum(p)             o' = o · exp2(m − m') + p v                at the end: out = o / l

in fp32, with log2(e) folded into scale. Bytes moved: q and out once, k and v once for each block of queries (from L2);
4 · B · H · N_q · N_k · D floating point operations and B · H · N_q · N_k exponentials, which at head dim 40 take longer
than the matrix products.

A head dim that is no power of two is multiplied in two parts, 40 as 32 + 16 (with 8 of the 16 masked) and 160 as
128 + 32: one part of 64 would do 1.33 times the work, one of 256 1.6 times.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.aot.variant import Launch, Variant
from kernels.triton.checks import (
    DTYPES,
    OLDEST,
    arch_of,
    archs_of,
    check_dtype,
    check_output,
    check_shape,
    check_tensors,
)
from kernels.triton.traced import open_on_gpu


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None,
              causal: bool = False) -> torch.Tensor:
    """Compute `attention` in plain torch. 16-bit inputs are computed in fp32 and rounded once; fp64 stays fp64."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bnhd,bmhd->bhnm", q.to(wide), k.to(wide)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v.to(wide)).to(q.dtype).contiguous()


@triton.jit
def _attend(
    q: tl.tensor, q_rest: tl.tensor, k_rows: tl.tensor, v_rows: tl.tensor,
    acc: tl.tensor, acc_rest: tl.tensor, high: tl.tensor, total: tl.tensor,
    seen: tl.tensor, exists: tl.tensor, scale: tl.tensor,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Take in one block of keys: those that `exists` [BLOCK_N, 1] are read, those `seen` [BLOCK_M, BLOCK_N] count."""
    main = tl.arange(0, MAIN)[None, :]
    s = tl.dot(q, tl.load(k_rows + main, mask=exists, other=0.0).T, input_precision=PRECISION)
    if REST:
        rest = MAIN + tl.arange(0, REST)[None, :]
        in_rest = exists & (rest < HEAD_DIM)
        s = tl.dot(q_rest, tl.load(k_rows + rest, mask=in_rest, other=0.0).T, s, input_precision=PRECISION)
    if MASKED:
        s = tl.where(seen, s, float("-inf"))
    higher = tl.maximum(high, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - higher[:, None])
    shrink = tl.exp2(high - higher)
    total = total * shrink + tl.sum(p, 1)
    v = tl.load(v_rows + main, mask=exists, other=0.0)
    p = p.to(v.dtype)
    acc = tl.dot(p, v, acc * shrink[:, None], input_precision=PRECISION)
    if REST:
        v = tl.load(v_rows + rest, mask=in_rest, other=0.0)
        acc_rest = tl.dot(p, v, acc_rest * shrink[:, None], input_precision=PRECISION)
    return acc, acc_rest, higher, total


@triton.jit
def _attention_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, out_ptr: tl.tensor, n_q: tl.tensor, n_k: tl.tensor,
    stride_qb: tl.tensor, stride_qn: tl.tensor, stride_qh: tl.tensor,
    stride_kb: tl.tensor, stride_kn: tl.tensor, stride_kh: tl.tensor,
    stride_vb: tl.tensor, stride_vn: tl.tensor, stride_vh: tl.tensor, scale: tl.tensor,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
) -> None:
    """Do BLOCK_M queries of one head; the grid is (blocks of queries, heads, batch). `scale` includes log2(e)."""
    first = tl.program_id(0) * BLOCK_M
    head, heads, batch = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    q_ptr += tl.multiple_of(batch * stride_qb + tl.cast(head, tl.int64) * stride_qh
                            + tl.cast(first, tl.int64) * stride_qn, ALIGN)
    k_ptr += tl.multiple_of(batch * stride_kb + tl.cast(head, tl.int64) * stride_kh, ALIGN)
    v_ptr += tl.multiple_of(batch * stride_vb + tl.cast(head, tl.int64) * stride_vh, ALIGN)
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    k_rows = k_ptr + tl.multiple_of(cols * stride_kn, ALIGN)[:, None]
    v_rows = v_ptr + tl.multiple_of(cols * stride_vn, ALIGN)[:, None]
    k_step, v_step = tl.cast(stride_kn, tl.int64), tl.cast(stride_vn, tl.int64)

    q_rows = q_ptr + tl.multiple_of(rows * stride_qn, ALIGN)[:, None]
    in_q = (first + rows < n_q)[:, None]
    main = tl.arange(0, MAIN)[None, :]
    q = tl.load(q_rows + main, mask=in_q, other=0.0)
    acc = tl.zeros([BLOCK_M, MAIN], tl.float32)
    q_rest, acc_rest = q, acc
    if REST:
        rest = MAIN + tl.arange(0, REST)[None, :]
        q_rest = tl.load(q_rows + rest, mask=in_q & (rest < HEAD_DIM), other=0.0)
        acc_rest = tl.zeros([BLOCK_M, REST], tl.float32)
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    # Whole blocks that every row sees need no mask; the others, up to `end`, are the diagonal or the last keys.
    whole, end = n_k // BLOCK_N * BLOCK_N, n_k
    if CAUSAL:
        whole, end = first // BLOCK_N * BLOCK_N, tl.minimum(n_k, first + BLOCK_M)
    every = tl.full([BLOCK_N, 1], True, tl.int1)
    for start in tl.range(0, whole, BLOCK_N):
        acc, acc_rest, high, total = _attend(
            q, q_rest, k_rows + start * k_step, v_rows + start * v_step, acc, acc_rest, high, total, every, every,
            scale, HEAD_DIM, MAIN, REST, PRECISION, MASKED=False)
    for start in tl.range(whole, end, BLOCK_N, num_stages=1):
        seen = (start + cols < end)[None, :]
        if CAUSAL:
            seen = seen & (start + cols[None, :] <= first + rows[:, None])
        acc, acc_rest, high, total = _attend(
            q, q_rest, k_rows + start * k_step, v_rows + start * v_step, acc, acc_rest, high, total, seen,
            (start + cols < n_k)[:, None], scale, HEAD_DIM, MAIN, REST, PRECISION, MASKED=True)

    out_rows = out_ptr + ((batch * n_q + first) * heads + head) * HEAD_DIM + (rows * heads * HEAD_DIM)[:, None]
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_rows + main, out, mask=in_q)
    if REST:
        out = (acc_rest / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_rows + rest, out, mask=in_q & (rest < HEAD_DIM))


@dataclass(frozen=True)
class Config:
    """A config cuts one launch: queries and keys of a block, warps, pipeline stages, and how fp32 is multiplied."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    precision: str

    def name(self, dtype: str, head_dim: int, causal: bool) -> str:
        """Return the name of the `Variant` that is built for this launch."""
        return (f"attention_{dtype}_d{head_dim}_{self.block_m}x{self.block_n}_{self.precision}"
                f"_w{self.num_warps}_s{self.num_stages}{'_causal' if causal else ''}")


def config(batch: int, heads: int, n_q: int, n_k: int, head_dim: int, dtype: str, arch: int) -> Config:
    """Return how one shape is cut on one compute capability (90: 9.0).

    Chosen so that the accumulators stay in registers and, up to head dim 80 in 16 bits, two blocks share a
    multiprocessor: one multiplies while the other takes exponentials.
    """
    block_m, block_n, warps, stages, precision = 128, 64, 8, 3 if head_dim <= 80 else 2, "ieee"
    if head_dim > 256:
        roomy = arch in (80, 90, 100)  # more than 99 KiB of shared memory for a block
        block_m, block_n, stages = (64, 32, 2) if roomy else (32, 32, 1)
        if dtype == "fp32" or arch < 80:
            block_m, block_n, stages = 16, 16, 1
    elif dtype == "fp32" and arch >= 80 and head_dim <= 128:
        block_m, block_n, stages, precision = 64, 32, 2, "tf32x3"  # fp32 accuracy from three products on tensor cores
    elif dtype == "fp32" or arch < 80:  # multiplied without tensor cores, where larger tiles spill
        block_m, block_n, stages = 32, 32, 1
    elif head_dim > 160:
        block_n = 32
    if block_m == 128 and batch * heads * triton.cdiv(n_q, block_m) < 128:  # too few blocks to fill a large GPU
        block_m, warps = 64, 4
    if triton.cdiv(n_k, block_n) * block_n > 1.25 * n_k:
        block_n = min(block_n, 32)
    return Config(block_m, block_n, warps, stages, precision)


def _constants(cfg: Config, head_dim: int, align: int, causal: bool) -> dict[str, int | float | bool | str]:
    main = 1 << (head_dim.bit_length() - 1)
    rest = max(16, triton.next_power_of_2(head_dim - main)) if head_dim > main else 0
    return {"HEAD_DIM": head_dim, "MAIN": main, "REST": rest, "BLOCK_M": cfg.block_m, "BLOCK_N": cfg.block_n,
            "ALIGN": align, "CAUSAL": causal, "PRECISION": cfg.precision}


def plan(cfg: Config, shape: Sequence[int], n_k: int, strides: Sequence[Sequence[int]], scale: float | None = None,
         causal: bool = False) -> Launch:
    """Return the launch of q [B, N_q, H, D] = `shape` with n_k keys, cut by `cfg`; its pointers are q, k, v and out.

    strides: elements from one batch entry, token and head to the next, of q, k and v.
    """
    batch, n_q, heads, head_dim = shape
    flat = {f"stride_{t}{axis}": s for t, tensor in zip("qkv", strides, strict=True)
            for axis, s in zip("bnh", tensor, strict=True)}
    return Launch(
        _attention_kernel, (triton.cdiv(n_q, cfg.block_m), heads, batch),
        {"n_q": n_q, "n_k": n_k, **flat, "scale": (head_dim ** -0.5 if scale is None else scale) * math.log2(math.e)},
        _constants(cfg, head_dim, math.gcd(16, *flat.values()), causal), cfg.num_warps, cfg.num_stages)


def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, *, scale: float | None = None,
           causal: bool = False) -> None:
    """Run the Triton kernel, which writes `attention` into `out` [B, N_q, H, D], contiguous, of q's dtype.

    Raises ValueError or TypeError for what the kernel cannot do; the message says what it got and what it takes.
    """
    check(q, k, v, scale, causal)
    check_output("attention", _attention_kernel, out, q, q.shape)
    batch, n_q, heads, head_dim = q.shape
    cfg = config(batch, heads, n_q, k.shape[1], head_dim, DTYPES[q.dtype], arch_of(q))
    plan(cfg, q.shape, k.shape[1], [t.stride()[:3] for t in (q, k, v)], scale, causal)(q, k, v, out)


def variants() -> Iterator[Variant]:
    """Yield what UNets, text encoders and VAEs of SD 1.5, SD 2.1, SDXL and models/shapes launch on any architecture.

    Their strides are multiples of 8 (those of models/shapes of 16), which ALIGN states.
    """
    shapes = [(d, n_q, n_k, False) for d in (40, 64, 80, 160) for n_q in (64, 4096) for n_k in (64, 77)]
    shapes += [(d, 64, n_k, False) for d in (32, 48) for n_k in (64, 32)]
    shapes += [(512, 4096, 4096, False), (32, 32, 32, True), (64, 77, 77, True)]
    launched: dict[str, tuple[Config, str, int, bool]] = {}
    archs: dict[str, set[int]] = {}
    for dtype, (head_dim, n_q, n_k, causal) in itertools.product(OLDEST, shapes):
        for arch in archs_of(dtype):
            cfg = config(2, 8, n_q, n_k, head_dim, dtype, arch)
            name = cfg.name(dtype, head_dim, causal)
            launched[name] = cfg, dtype, head_dim, causal
            archs.setdefault(name, set()).add(arch)
    pointers = ("q_ptr", "k_ptr", "v_ptr", "out_ptr")
    for name, (cfg, dtype, head_dim, causal) in launched.items():
        yield Variant(
            op="attention", name=name, kernel=_attention_kernel,
            signature={**dict.fromkeys(pointers, f"*{dtype}"), "n_q": "i32", "n_k": "i32",
                       **{f"stride_{t}{axis}": "i32" for t in "qkv" for axis in "bnh"}, "scale": "fp32"},
            constants=_constants(cfg, head_dim, 8, causal), divisible=pointers,
            num_warps=cfg.num_warps, num_stages=cfg.num_stages, archs=tuple(sorted(archs[name])))


@torch.library.custom_op(
    "latentrt::attention", mutates_args=(), device_types="cpu",
    schema="(Tensor q, Tensor k, Tensor v, *, float? scale=None, bool causal=False) -> Tensor")
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None,
              causal: bool = False) -> torch.Tensor:
    """Compute softmax(scale · q kᵀ) v per batch entry and head.

    q [B, N_q, H, D], k and v [B, N_k, H, D] → [B, N_q, H, D], contiguous. fp16, bf16 or fp32, all three alike; any
    strides whose last is 1, so that views into a fused projection [B, N, 3, H, D] are read in place; D from 16 to 256,
    or 512. scale > 0, 1 / sqrt(D) by default. causal: query i sees the keys up to i, with as many keys as queries.
    Raises TypeError for dtypes, ValueError for the rest. On a CPU this is the reference.
    """
    check(q, k, v, scale, causal)
    return reference(q, k, v, scale=scale, causal=causal)


@attention.register_kernel("cuda")
def _on_gpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None,
            causal: bool = False) -> torch.Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch(q, k, v, out, scale=scale, causal=causal)
    return out


open_on_gpu(attention, _on_gpu)


@attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None,
      causal: bool = False) -> torch.Tensor:
    return q.new_empty(q.shape)


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, causal: bool) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise ValueError(f"attention: {name}: got shape {tuple(t.shape)}, expected [batch, tokens, heads, head dim]"
                             "; split the heads with .unflatten(2, (heads, -1))")
    check_tensors("attention", q=q, k=k, v=v)
    check_dtype("attention", q.dtype, k=k, v=v)
    batch, n_q, heads, head_dim = q.shape
    check_shape("attention", (batch, k.shape[1], heads, head_dim), k=k, v=v)
    if not (16 <= head_dim <= 256 or head_dim == 512):
        raise ValueError(f"attention: head dim: got {head_dim}, expected 16 to 256, or 512")
    if 0 in (*q.shape, k.shape[1]) or max(batch, heads) > 65535:
        raise ValueError(f"attention: got q {tuple(q.shape)} and k {tuple(k.shape)}, expected one of everything or "
                         "more, and at most 65535 heads and batch entries; split the batch")
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.stride(3) != 1:
            raise ValueError(f"attention: {name}: got strides {t.stride()}, expected the head dim to be contiguous "
                             "(a last stride of 1); call .contiguous()")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"attention: scale: got {scale}, expected a positive number; negate q for a negative one")
    if causal and n_q != k.shape[1]:
        raise ValueError(f"attention: causal: got {n_q} queries and {k.shape[1]} keys, expected as many of both")
