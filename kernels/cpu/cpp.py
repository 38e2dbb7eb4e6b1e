"""The C++ kernels for CPUs, on numpy arrays: attention, group norm with SiLU, and weights with changes of low rank.

bfloat16 arrays are those of `ml_dtypes`, or uint16 with the same bits. Whether the kernels are here at all, and for
which instruction sets, `kernels.cpu.library` says.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from kernels.cpu import library
from kernels.cpu.library import AttentionArgs, GroupNormArgs, LowRankArgs, Strides

_DTYPES = {"float32": 0, "bfloat16": 1, "uint16": 1, "float16": 2}
_QKV_OUT = ("q", "k", "v", "out")

_Layout = tuple[np.dtype[Any], tuple[int, ...], tuple[int, ...]]
"""dtype, shape and strides of an array, in bytes."""


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray | None = None, *,
              scale: float | None = None, causal: bool = False, threads: int | None = None,
              isa: str | None = None) -> np.ndarray:
    """Compute softmax(scale q kᵀ) v for each batch and head; returns `out`, or a new array laid out as q is.

    q, out: [batch, heads, queries, head_dim]; k, v: [batch, heads, keys, head_dim]; all float32 or all bfloat16. Any
    strides with the last dimension contiguous, so a [batch, tokens, heads, head_dim] array is passed as
    `x.transpose(0, 2, 1, 3)` and a fused projection as its slices. head_dim: a multiple of 8 up to 1024. out shares no
    memory with the others. scale: 1 / sqrt(head_dim) unless given. causal: query i sees keys 0 … i. threads: those that
    the process may run on unless given. isa: one of `library.isas()`, the best unless given.

    Raises ValueError for arrays it does not take, CpuKernelError where the kernels are missing or fail.
    """
    if out is None:
        out = np.empty_like(q)
    arrays = (q, k, v, out)
    template = _attention_args(tuple(map(_layout, arrays)), scale, causal, _threads(threads), isa)
    args = AttentionArgs.from_buffer_copy(template)
    args.q, args.k, args.v, args.out = (_address(name, a) for name, a in zip(_QKV_OUT, arrays, strict=True))
    if not out.flags.writeable:
        raise ValueError("out: got a read-only array, expected one to write to; pass a copy")
    if any(np.may_share_memory(out, a) for a in (q, k, v)):
        raise ValueError("out: got memory that q, k or v may use too, expected its own; pass np.empty_like(q)")
    library.call("latentrt_attention", args)
    return out


def group_norm(x: np.ndarray, groups: int, weight: np.ndarray, bias: np.ndarray, out: np.ndarray | None = None, *,
               eps: float = 1e-5, silu: bool = False, channels_last: bool = False, threads: int | None = None,
               isa: str | None = None) -> np.ndarray:
    """Normalise each group of channels over all positions, times weight plus bias, then x · sigmoid(x) if `silu`.

    x, out: [batch, channels, …], or [batch, …, channels] if `channels_last`; C-contiguous; float32, bfloat16 or
    float16; out may be x. weight, bias: [channels], of any of these dtypes. eps: of the model, 1e-5 or 1e-6 as a rule.
    Returns `out`, or a new array. threads and isa: as in `attention`.

    Raises ValueError for arrays it does not take, CpuKernelError where the kernels are missing or fail.
    """
    if out is None:
        out = np.empty_like(x)
    template = _group_norm_args(_layout(x), _layout(out), groups, eps, silu, channels_last, _threads(threads), isa)
    args = GroupNormArgs.from_buffer_copy(template)
    weight, bias = (_parameter(name, a, args.channels) for name, a in (("weight", weight), ("bias", bias)))
    args.x, args.out = _address("x", x), _address("out", out)
    args.weight, args.bias = _address("weight", weight), _address("bias", bias)
    if not out.flags.writeable:
        raise ValueError("out: got a read-only array, expected one to write to; pass a copy")
    if args.out != args.x and np.may_share_memory(x, out):
        raise ValueError("out: got memory that overlaps x, expected x itself or none of it; pass np.empty_like(x)")
    library.call("latentrt_group_norm", args)
    return out


def low_rank(base: np.ndarray, up: np.ndarray, down: np.ndarray, out: np.ndarray, *, threads: int | None = None,
             isa: str | None = None) -> np.ndarray:
    """Compute base + up · down in float32, rounded to nearest even; returns `out`. With rank 0 it converts.

    base, out: [rows, …] of one shape, C-contiguous, each float32, bfloat16 or float16. up: float32 [rows, rank]. down:
    float32 [rank, …]. In bfloat16 finite numbers stay finite. threads and isa: as in `attention`.

    Raises ValueError for arrays it does not take, CpuKernelError where the kernels are missing or fail.
    """
    rank, columns = len(down), math.prod(base.shape[1:])
    for name, array, shape in (("base", base, base.shape), ("out", out, base.shape), ("up", up, (len(base), rank)),
                               ("down", down, (rank, *down.shape[1:]))):
        if array.shape != shape or (not array.size and name in ("base", "out")):
            raise ValueError(f"{name}: got shape {array.shape}, expected {shape}, of at least one value; reshape it")
        allowed = ("float32",) if name in ("up", "down") else tuple(_DTYPES)
        if array.dtype.name not in allowed or not array.dtype.isnative or not array.flags.c_contiguous:
            raise ValueError(f"{name}: got {array.dtype} with strides {array.strides}, expected C-contiguous "
                             f"{' or '.join(allowed)}; convert it")
    if math.prod(down.shape[1:]) != columns and rank:
        raise ValueError(f"down: got shape {down.shape}, expected {columns} values in each of its rows; reshape it")
    if not out.flags.writeable or np.may_share_memory(base, out):
        raise ValueError("out: got memory that is read-only or base's, expected its own; pass np.empty_like(base)")
    args = LowRankArgs(base_dtype=_DTYPES[base.dtype.name], out_dtype=_DTYPES[out.dtype.name], isa=_isa(isa),
                        rows=len(base), columns=columns, rank=rank, threads=_threads(threads))
    args.base, args.up, args.down, args.out = (a.ctypes.data for a in (base, up, down, out))
    library.call("latentrt_low_rank", args)
    return out


def _layout(array: np.ndarray) -> _Layout:
    return array.dtype, array.shape, array.strides


def _address(name: str, array: np.ndarray) -> int:
    address: int = array.__array_interface__["data"][0]
    if address % array.itemsize:
        raise ValueError(f"{name}: got an address that {array.itemsize} does not divide, expected an aligned array; "
                         "copy it")
    return address


# What follows depends on nothing but layouts and options, and is remembered: models call the same few again and again.


@functools.lru_cache(maxsize=512)
def _attention_args(layouts: tuple[_Layout, ...], scale: float | None, causal: bool, threads: int,
                    isa: str | None) -> AttentionArgs:
    """Return arguments that are checked, and complete but for addresses."""
    _check_attention(dict(zip(_QKV_OUT, layouts, strict=True)))
    (dtype, (batch, heads, queries, head_dim), _), (_, k_shape, _), *_ = layouts
    scale = head_dim ** -0.5 if scale is None else scale
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, expected a finite number; pass None for 1 / sqrt(head_dim)")
    args = AttentionArgs(dtype=_DTYPES[dtype.name], isa=_isa(isa), batch=batch, heads=heads, queries=queries,
                          keys=k_shape[2], head_dim=head_dim, scale=scale, causal=causal, threads=threads)
    for name, (_, _, strides) in zip(_QKV_OUT, layouts, strict=True):
        setattr(args, f"{name}_stride", Strides(*(stride // dtype.itemsize for stride in strides[:3])))
    return args


@functools.lru_cache(maxsize=512)
def _group_norm_args(x: _Layout, out: _Layout, groups: int, eps: float, silu: bool, channels_last: bool, threads: int,
                     isa: str | None) -> GroupNormArgs:
    """Return arguments that are checked, and complete but for addresses."""
    channels, positions = _check_group_norm(x, out, groups, channels_last)
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps: got {eps}, expected a finite number that is not negative; 1e-5 is usual")
    dtype, shape, _ = x
    return GroupNormArgs(dtype=_DTYPES[dtype.name], isa=_isa(isa), batch=shape[0], channels=channels,
                          positions=positions, groups=groups, eps=eps, silu=silu, channels_last=channels_last,
                          threads=threads)


def _check_attention(arrays: Mapping[str, _Layout]) -> None:
    q_dtype, q_shape, _ = arrays["q"]
    for name, (dtype, shape, strides) in arrays.items():
        if len(shape) != 4 or 0 in shape:
            raise ValueError(f"{name}: got shape {shape}, expected [batch, heads, tokens, head_dim], none of them 0; "
                             "reshape it")
        if dtype.name not in ("float32", "bfloat16", "uint16") or not dtype.isnative:
            raise ValueError(f"{name}: got dtype {dtype}, expected float32 or bfloat16; convert it")
        if dtype != q_dtype:
            raise ValueError(f"{name}: got dtype {dtype}, expected q's {q_dtype}; convert one of them")
        if strides[3] != dtype.itemsize or any(stride % dtype.itemsize for stride in strides):
            raise ValueError(f"{name}: got strides {strides} bytes, expected the last dimension to be contiguous; pass "
                             f"np.ascontiguousarray({name})")
    k_shape = arrays["k"][1]
    expected = {"q": q_shape, "k": (*q_shape[:2], k_shape[2], q_shape[3]), "v": k_shape, "out": q_shape}
    for name, (_, shape, _) in arrays.items():
        if shape != expected[name]:
            raise ValueError(f"{name}: got shape {shape}, expected {expected[name]}; repeat heads or reshape")
    if q_shape[3] % 8 or q_shape[3] > 1024:
        raise ValueError(f"head_dim: got {q_shape[3]}, expected a multiple of 8 up to 1024; pad q, k and v with zeros "
                         "and pass the scale of the size before")


def _check_group_norm(x: _Layout, out: _Layout, groups: int, channels_last: bool) -> tuple[int, int]:
    """Return channels and positions. Raises ValueError for arrays that the kernel does not take."""
    for name, (dtype, shape, strides) in (("x", x), ("out", out)):
        if len(shape) < 2 or 0 in shape:
            raise ValueError(f"{name}: got shape {shape}, expected [batch, channels, …], none of them 0; reshape it")
        if dtype.name not in _DTYPES or not dtype.isnative:
            raise ValueError(f"{name}: got dtype {dtype}, expected float32, bfloat16 or float16; convert it")
        contiguous = dtype.itemsize
        for size, stride in zip(reversed(shape), reversed(strides), strict=True):
            if size > 1 and stride != contiguous:
                raise ValueError(f"{name}: got strides {strides}, expected a C-contiguous array; pass "
                                 f"np.ascontiguousarray({name}), or channels_last=True for data that is")
            contiguous *= size
    (dtype, shape, _), (out_dtype, out_shape, _) = x, out
    if out_shape != shape or out_dtype != dtype:
        raise ValueError(f"out: got {out_shape} {out_dtype}, expected x's {shape} {dtype}; pass np.empty_like(x)")
    channels = shape[-1 if channels_last else 1]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups: got {groups} for {channels} channels, expected a divisor; check channels_last")
    return channels, math.prod(shape) // (shape[0] * channels)


def _parameter(name: str, array: np.ndarray, channels: int) -> np.ndarray:
    if array.shape != (channels,):
        raise ValueError(f"{name}: got shape {array.shape}, expected ({channels},), one for each channel; reshape it")
    if array.dtype == np.float32 and array.flags.c_contiguous:
        return array
    if array.dtype.name not in _DTYPES or not array.dtype.isnative:
        raise ValueError(f"{name}: got dtype {array.dtype}, expected float32, bfloat16 or float16; convert it")
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(array, dtype=np.float32)


def _threads(threads: int | None) -> int:
    if threads is None:
        return min(len(os.sched_getaffinity(0)), 512)
    if not 1 <= threads <= 512:
        raise ValueError(f"threads: got {threads}, expected 1 to 512; pass None for all that the process may run on")
    return threads


def _isa(name: str | None) -> int:
    if name is None:
        return 0
    if name not in library.isas():
        raise ValueError(f"isa: got {name!r}, expected one of {', '.join(library.isas())} on this CPU; pass None for "
                         "the best")
    return library.ISAS.index(name) + 1
