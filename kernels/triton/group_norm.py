"""Group norm, optionally followed by SiLU: y = (x − mean) / sqrt(var + eps) · weight + bias, y = y · sigmoid(y).

mean and var are those of one group of one image: channels / groups channels at every position. They are computed in
fp32 and never as E[x²] − E[x]²: a group in registers is centred before it is squared, longer runs use Welford's
recurrence, and parts of n_i values with mean m_i and squared deviations M2_i are merged as in Chan, Golub and LeVeque
(1979):

    n = Σ n_i        mean = Σ n_i m_i / n        M2 = Σ M2_i + Σ n_i (m_i − mean)²        var = M2 / n

Bytes moved: a group that fits in registers is read once and written once, in one launch. A larger one takes two, and is
read twice: for the statistics of its parts, and to be normalised (from L2, where the images fit there); written once.

The kernels work on tiles [ROWS positions, COLS channels] of one image. The channels are `cols` in number, and belong to
at most GROUPS groups; programs are (channel slabs, chunks of positions, images).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.aot.variant import Launch, Variant
from kernels.triton.checks import (
    OLDEST,
    archs_of,
    check_contiguous,
    check_dtype,
    check_output,
    check_shape,
    check_tensors,
)
from kernels.triton.traced import open_on_gpu


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float,
              silu: bool = False) -> torch.Tensor:
    """`group_norm` in plain torch. 16-bit inputs are computed in fp32 and rounded once; fp64 stays fp64."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    grouped = wide.reshape(x.shape[0], groups, -1)
    var, mean = torch.var_mean(grouped, -1, correction=0, keepdim=True)
    y = ((grouped - mean) * torch.rsqrt(var + eps)).reshape(x.shape)
    per_channel = (-1, *[1] * (x.dim() - 2))
    y = y * weight.to(wide.dtype).reshape(per_channel) + bias.to(wide.dtype).reshape(per_channel)
    return torch.empty_like(x).copy_(y * torch.sigmoid(y) if silu else y)


@triton.jit
def _slab(
    channels: tl.tensor, per_group: tl.tensor, cols: tl.tensor, COLS: tl.constexpr, GROUPS: tl.constexpr,
    ALIGN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The channels of this program: the first, which exist [COLS]; its first group, their number, who is in which."""
    cols = cols // ALIGN * ALIGN  # tells the compiler that masks change at multiples of ALIGN only: wide loads
    channel = tl.multiple_of(tl.program_id(0) * cols, ALIGN)
    column = tl.arange(0, COLS)
    exists = (column < cols) & (channel + column < channels)
    group = channel // per_group
    member = ((channel + column) // per_group - group)[None, :] == tl.arange(0, GROUPS)[:, None]
    return channel, exists, group, channels // per_group - group, member & exists[None, :]


@triton.jit
def _offsets(
    channel: tl.tensor, first: tl.tensor, positions: tl.tensor, channels: tl.tensor,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Where the tile at (first, channel) begins, and the offsets [ROWS, COLS] within it."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    image = tl.program_id(2).to(tl.int64) * positions * channels
    if CHANNELS_LAST:
        return image + tl.cast(first, tl.int64) * channels + channel, row * channels + column
    else:
        return image + tl.cast(channel, tl.int64) * positions + first, column * positions + row


@triton.jit
def _to_groups(by_channel: tl.tensor, member: tl.tensor) -> tl.tensor:
    return tl.sum(tl.where(member, by_channel[None, :], 0.0), 1)


@triton.jit
def _to_channels(by_group: tl.tensor, member: tl.tensor) -> tl.tensor:
    return tl.sum(tl.where(member, by_group[:, None], 0.0), 0)


@triton.jit
def _finish(
    x: tl.tensor, mean: tl.tensor, scale: tl.tensor, bias: tl.tensor, silu: tl.tensor
) -> tl.tensor:
    y = (x - mean[None, :]) * scale[None, :] + bias[None, :]
    if silu != 0:
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def _whole_kernel(
    x_ptr: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor, out_ptr: tl.tensor,
    positions: tl.tensor, channels: tl.tensor, per_group: tl.tensor, cols: tl.tensor, silu: tl.tensor, eps: tl.tensor,
    ROWS: tl.constexpr, COLS: tl.constexpr, GROUPS: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
) -> None:
    """Whole groups in registers: ROWS ≥ positions."""
    channel, in_col, _, _, member = _slab(channels, per_group, cols, COLS, GROUPS, ALIGN)
    start, offsets = _offsets(channel, 0, positions, channels, ROWS, COLS, CHANNELS_LAST)
    exists = (tl.arange(0, ROWS) < positions)[:, None] & in_col[None, :]
    x = tl.load(x_ptr + start + offsets, mask=exists, other=0.0).to(tl.float32)
    n = tl.cast(positions * per_group, tl.float32)
    mean = _to_channels(_to_groups(tl.sum(x, 0), member) / n, member)
    centred = tl.where(exists, x - mean[None, :], 0.0)
    var = _to_groups(tl.sum(centred * centred, 0), member) / n
    column = channel + tl.arange(0, COLS)
    weight = tl.load(weight_ptr + column, mask=in_col, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=in_col, other=0.0).to(tl.float32)
    y = _finish(x, mean, _to_channels(tl.rsqrt(var + eps), member) * weight, bias, silu)
    tl.store(out_ptr + start + offsets, y.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _statistics_kernel(
    x_ptr: tl.tensor, parts_ptr: tl.tensor,
    positions: tl.tensor, channels: tl.tensor, per_group: tl.tensor, cols: tl.tensor, chunk: tl.tensor,
    ROWS: tl.constexpr, COLS: tl.constexpr, GROUPS: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
) -> None:
    """(n, mean, M2) of every group in `chunk` positions, into parts [images, 3, groups, chunks].

    Every element of the tile runs Welford's recurrence over the tiles of the chunk; the elements are merged at the end.
    """
    channel, in_col, group, groups, member = _slab(channels, per_group, cols, COLS, GROUPS, ALIGN)
    first = tl.program_id(1) * chunk
    start, offsets = _offsets(channel, first, positions, channels, ROWS, COLS, CHANNELS_LAST)
    step = tl.cast(channels, tl.int64) if CHANNELS_LAST else 1
    row = tl.arange(0, ROWS)
    length = tl.minimum(chunk, positions - first)
    seen = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, COLS], tl.float32)
    m2 = tl.zeros([ROWS, COLS], tl.float32)
    for done in tl.range(0, length, ROWS):
        in_row = first + done + row < positions
        exists = in_row[:, None] & in_col[None, :]
        x = tl.load(x_ptr + start + done * step + offsets, mask=exists, other=0.0).to(tl.float32)
        seen += in_row.to(tl.float32)
        share = tl.where(in_row, 1.0 / tl.maximum(seen, 1.0), 0.0)
        delta = x - mean
        mean += delta * share[:, None]
        m2 += tl.where(in_row[:, None], delta * (x - mean), 0.0)
    n = length.to(tl.float32) * per_group
    centre = _to_groups(tl.sum(mean * seen[:, None], 0), member) / n
    away = mean - _to_channels(centre, member)[None, :]
    m2 = _to_groups(tl.sum(m2 + away * away * seen[:, None], 0), member)
    index = tl.arange(0, GROUPS)
    total, parts = channels // per_group, tl.num_programs(1)
    out = parts_ptr + (tl.program_id(2) * 3 * total + group + index) * parts + tl.program_id(1)
    mine = (index < groups) & (index < tl.cdiv(cols, per_group))
    tl.store(out, tl.zeros([GROUPS], tl.float32) + n, mask=mine)
    tl.store(out + total * parts, centre, mask=mine)
    tl.store(out + 2 * total * parts, m2, mask=mine)


@triton.jit
def _normalise_kernel(
    x_ptr: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor, parts_ptr: tl.tensor, out_ptr: tl.tensor,
    positions: tl.tensor, channels: tl.tensor, per_group: tl.tensor, cols: tl.tensor, chunk: tl.tensor,
    parts: tl.tensor, silu: tl.tensor, eps: tl.tensor,
    ROWS: tl.constexpr, COLS: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
) -> None:
    """Merge `parts` parts of the statistics, as `_statistics_kernel` left them, and normalise `chunk` positions."""
    channel, in_col, group, groups, member = _slab(channels, per_group, cols, COLS, GROUPS, ALIGN)
    index, part = tl.arange(0, GROUPS)[:, None], tl.arange(0, PARTS)[None, :]
    total = channels // per_group
    at = parts_ptr + (tl.program_id(2) * 3 * total + group + index) * parts + part
    known = (index < groups) & (part < parts)
    n_part = tl.load(at, mask=known, other=0.0)
    mean_part = tl.load(at + total * parts, mask=known, other=0.0)
    m2_part = tl.load(at + 2 * total * parts, mask=known, other=0.0)
    n = tl.maximum(tl.sum(n_part, 1), 1.0)
    centre = tl.sum(n_part * mean_part, 1) / n
    away = mean_part - centre[:, None]
    var = tl.sum(m2_part + n_part * away * away, 1) / n

    column = channel + tl.arange(0, COLS)
    weight = tl.load(weight_ptr + column, mask=in_col, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=in_col, other=0.0).to(tl.float32)
    mean, scale = _to_channels(centre, member), _to_channels(tl.rsqrt(var + eps), member) * weight
    first = tl.program_id(1) * chunk
    start, offsets = _offsets(channel, first, positions, channels, ROWS, COLS, CHANNELS_LAST)
    step = tl.cast(channels, tl.int64) if CHANNELS_LAST else 1
    length = tl.minimum(chunk, positions - first)
    row = tl.arange(0, ROWS)
    for done in tl.range(0, length, ROWS):
        exists = (first + done + row < positions)[:, None] & in_col[None, :]
        here = start + done * step
        x = tl.load(x_ptr + here + offsets, mask=exists, other=0.0).to(tl.float32)
        y = _finish(x, mean, scale, bias, silu)
        tl.store(out_ptr + here + offsets, y.to(out_ptr.dtype.element_ty), mask=exists)


@dataclass(frozen=True)
class Config:
    """One launch of one of the kernels: channels of a slab, its tile, positions of a chunk, and warps."""

    cols: int
    rows: int
    wide: int
    groups: int
    chunk: int
    num_warps: int

    def name(self, kernel: str, dtype: str, channels_last: bool) -> str:
        """Of the `Variant` that is built for this launch of the kernel "whole", "statistics" or "normalise"."""
        align = _constants(self, channels_last)["ALIGN"]
        return (f"group_norm_{kernel}_{dtype}_{'nhwc' if channels_last else 'nchw'}"
                f"_{self.rows}x{self.wide}_g{self.groups}_a{align}_w{self.num_warps}")


PARTS = 256
"""The most parts that a group's statistics come in."""
TILE = 4096
"""Values in a tile of a split launch: 16 a thread."""
PROGRAMS = 512
"""What a split launch aims for: about four for each multiprocessor of a large GPU."""
WHOLE = ((64, 16), (64, 64), (64, 128), (256, 16), (256, 64), (256, 128), (1024, 16))
"""Tiles [positions, channels] that hold whole groups in registers, smallest first: at most 64 values a thread."""


def whole_config(positions: int, per_group: int, channels_last: bool) -> Config | None:
    """The launch of the kernel that keeps a group in registers; None for a group that is too large for it."""
    cols = per_group
    while channels_last and cols % 8 and cols < 64:  # 16-byte loads, where a few groups together allow them
        cols *= 2
    for rows, wide in WHOLE:
        if positions <= rows and cols <= wide:
            return Config(cols, rows, wide, 8 if channels_last else 1, positions, min(16, max(4, rows * wide // 1024)))
    return None


def split_config(images: int, positions: int, channels: int, per_group: int, channels_last: bool) -> Config:
    """The launch of either kernel of a group that is split: TILE values a tile, about PROGRAMS programs.

    A slab of channels-last memory is as many whole groups as fit into 128 channels (64, where they fill those), and a
    multiple of 16 bytes; of channels-first memory, one channel.
    """
    if channels_last:
        wide = 64 if 64 % per_group == 0 else max(128, triton.next_power_of_2(per_group))
        slabs = range(1, wide // per_group + 1)
        slab = max((s for s in slabs if s * per_group % 8 == 0), default=slabs[-1])
        cols, groups = slab * per_group, 8 if slab <= 8 else triton.next_power_of_2(slab)
    else:
        cols, wide, groups = 1, 1, 1
    rows = max(1, TILE // wide)
    chunks = max(1, min(PARTS, PROGRAMS // (triton.cdiv(channels, cols) * images)))
    return Config(cols, rows, wide, groups, triton.cdiv(triton.cdiv(positions, chunks), rows) * rows, 8)


def plan(images: int, positions: int, channels: int, groups: int, eps: float, silu: bool,
         channels_last: bool) -> tuple[Launch, ...]:
    """The launches of one shape: of a group in registers one, with the pointers x, weight, bias and out.

    Of a larger one two: statistics (x, parts; see `parts_shape`) and (x, weight, bias, parts, out).
    """
    per_group = channels // groups
    if cfg := whole_config(positions, per_group, channels_last):
        scalars = {"positions": positions, "channels": channels, "per_group": per_group, "cols": cfg.cols,
                   "silu": int(silu), "eps": eps}
        return (Launch(_whole_kernel, (triton.cdiv(channels, cfg.cols), 1, images), scalars,
                       _constants(cfg, channels_last), cfg.num_warps, 1),)
    # Channels-first, a group is one run of values: for its statistics, a single channel of that many positions.
    run, members = (positions, per_group) if channels_last else (positions * per_group, 1)
    cfg = split_config(images, run, groups * members, members, channels_last)
    parts = triton.cdiv(run, cfg.chunk)
    statistics = Launch(
        _statistics_kernel, (triton.cdiv(groups * members, cfg.cols), parts, images),
        {"positions": run, "channels": groups * members, "per_group": members, "cols": cfg.cols, "chunk": cfg.chunk},
        _constants(cfg, channels_last), cfg.num_warps, 1)
    cfg = split_config(images, positions, channels, per_group, channels_last)
    normalise = Launch(
        _normalise_kernel, (triton.cdiv(channels, cfg.cols), triton.cdiv(positions, cfg.chunk), images),
        {"positions": positions, "channels": channels, "per_group": per_group, "cols": cfg.cols, "chunk": cfg.chunk,
         "parts": parts, "silu": int(silu), "eps": eps},
        {"PARTS": PARTS, **_constants(cfg, channels_last)}, cfg.num_warps, 1)
    return statistics, normalise


def parts_shape(images: int, groups: int, statistics: Launch) -> tuple[int, int, int, int]:
    """Of what the statistics of a split group come in: [images, (n, mean, M2), groups, parts], float32."""
    return images, 3, groups, statistics.grid[1]


def launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor, groups: int, eps: float,
           silu: bool = False) -> None:
    """Run the Triton kernels: `group_norm`, written into `out`, which has x's shape, dtype and strides.

    Raises ValueError or TypeError for what the kernels cannot do; the message says what it got and what they take.
    """
    _check(x, weight, bias, groups)
    check_output("group_norm", _whole_kernel, out, x, x.shape, x.stride())
    images, channels = x.shape[:2]
    *statistics, last = plan(images, x.numel() // (images * channels), channels, groups, eps, silu, _channels_last(x))
    if not statistics:
        last(x, weight, bias, out)
        return
    shape = parts_shape(images, groups, statistics[0])
    parts = torch.empty(shape, dtype=torch.float32, device=x.device)
    statistics[0](x, parts)
    last(x, weight, bias, parts, out)


def _constants(cfg: Config, channels_last: bool) -> dict[str, int | float | bool | str]:
    return {"ROWS": cfg.rows, "COLS": cfg.wide, "GROUPS": cfg.groups,
            "ALIGN": math.gcd(8, cfg.cols) if channels_last else 1, "CHANNELS_LAST": channels_last}


def variants() -> Iterator[Variant]:
    """What the UNets and VAEs of SD 1.5, SD 2.1, SDXL and models/shapes launch, in both memory orders.

    In those every slab begins at a multiple of 8 channels, or is one channel; weight and bias have x's dtype.
    """
    seen = set()
    for dtype, last, per_group in itertools.product(OLDEST, (True, False), (4, 8, 10, 12, 16, 20, 24, 30, 40, 60, 80)):
        split = split_config(1, 2**20, 32 * per_group, per_group, last)
        whole = [cfg for positions in (64, 256, 1024) if (cfg := whole_config(positions, per_group, last))]
        launches = [("whole", _whole_kernel, cfg) for cfg in whole]
        launches += [("statistics", _statistics_kernel, split), ("normalise", _normalise_kernel, split)]
        for kind, kernel, cfg in launches:
            constants = _constants(cfg, last) | ({"PARTS": PARTS} if kind == "normalise" else {})
            name = cfg.name(kind, dtype, last)
            if name in seen:
                continue
            seen.add(name)
            signature = {}
            for argument in kernel.arg_names:
                if argument == "parts_ptr":
                    signature[argument] = "*fp32"
                elif argument.endswith("_ptr"):
                    signature[argument] = f"*{dtype}"
                elif argument not in constants:
                    signature[argument] = "fp32" if argument == "eps" else "i32"
            pointers = tuple(a for a in signature if a.endswith("_ptr"))
            yield Variant(op="group_norm", name=name, kernel=kernel, signature=signature, constants=constants,
                          divisible=(*pointers, "channels" if last else "positions",
                                     *(a for a in signature if a == "chunk")), num_warps=cfg.num_warps,
                          num_stages=1, archs=archs_of(dtype))


@torch.library.custom_op(
    "latentrt::group_norm", mutates_args=(), device_types="cpu",
    schema="(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu=False) -> Tensor")
def group_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float,
               silu: bool = False) -> torch.Tensor:
    """Group norm of x [images, channels, …] over `groups` groups of channels, then SiLU where asked for.

    x is fp16, bf16 or fp32, contiguous in channels-first or channels-last memory, and the result has its strides;
    weight and bias [channels] have its dtype or are fp32. Raises TypeError for dtypes, ValueError for the rest. On a
    CPU this is the reference.
    """
    _check(x, weight, bias, groups)
    return reference(x, weight, bias, groups, eps, silu)


@group_norm.register_kernel("cuda")
def _on_gpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float,
      silu: bool = False) -> torch.Tensor:
    out = torch.empty_like(x)
    launch(x, weight, bias, out, groups, eps, silu)
    return out


open_on_gpu(group_norm, _on_gpu)


@group_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float,
      silu: bool = False) -> torch.Tensor:
    return torch.empty_like(x)


def _channels_last(x: torch.Tensor) -> bool:
    return x.movedim(1, -1).is_contiguous()


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int) -> None:
    check_tensors("group_norm", x=x, weight=weight, bias=bias)
    if x.dim() < 2 or x.numel() == 0 or x.shape[0] > 65535:
        raise ValueError(f"group_norm: x: got shape {tuple(x.shape)}, expected [images, channels, …] with at least one "
                         "value and at most 65535 images")
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"group_norm: groups: got {groups}, expected a divisor of the {channels} channels")
    if channels // groups > 4096 or x.numel() // x.shape[0] >= 2**31:
        raise ValueError(f"group_norm: x: got shape {tuple(x.shape)} in {groups} groups, expected at most 4096 "
                         "channels in a group and less than 2**31 values in an image")
    check_shape("group_norm", (channels,), weight=weight, bias=bias)
    check_dtype("group_norm", weight.dtype, bias=bias)
    if weight.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"group_norm: weight: got {weight.dtype}, expected {x.dtype}, as x, or torch.float32")
    check_contiguous("group_norm", weight=weight, bias=bias)
    if not (x.is_contiguous() or _channels_last(x)):
        raise ValueError(f"group_norm: x: got shape {tuple(x.shape)} with strides {x.stride()}, expected channels-first"
                         " or channels-last memory without gaps; call .contiguous()")
