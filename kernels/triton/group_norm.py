"""Group norm, optionally followed by SiLU: y = (x − mean) / sqrt(var + eps) · weight + bias, y = y · sigmoid(y).

mean and var are those of one group of one image: channels / groups channels at every position. They are computed in
fp32 and never as E[x²] − E[x]²: a group in registers is centred before it is squared, longer runs use Welford's
recurrence, and parts of n_i values with mean m_i and squared deviations M2_i are merged as in Chan, Golub and LeVeque
(1979):

    n = Σ n_i        mean = Σ n_i m_i / n        M2 = Σ M2_i + Σ n_i (m_i − mean)²        var = M2 / n

Bytes moved: a group that fits in registers is read once and written once, in one launch. A larger one takes two, and is
read twice: for the statistics of its parts, and to be normalised (from L2, where the images fit there); written once.
The kernels are in `group_norm_kernels.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

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
from kernels.triton.group_norm_kernels import normalise_kernel, statistics_kernel, whole_kernel
from kernels.triton.traced import open_on_gpu


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float,
              silu: bool = False) -> torch.Tensor:
    """Compute `group_norm` in plain torch. 16-bit inputs are computed in fp32 and rounded once; fp64 stays fp64."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    grouped = wide.reshape(x.shape[0], groups, -1)
    var, mean = torch.var_mean(grouped, -1, correction=0, keepdim=True)
    y = ((grouped - mean) * torch.rsqrt(var + eps)).reshape(x.shape)
    per_channel = (-1, *[1] * (x.dim() - 2))
    y = y * weight.to(wide.dtype).reshape(per_channel) + bias.to(wide.dtype).reshape(per_channel)
    return torch.empty_like(x).copy_(y * torch.sigmoid(y) if silu else y)


@dataclass(frozen=True)
class Config:
    """A config is a launch of one of the kernels: channels of a slab, its tile, positions of a chunk, and warps."""

    cols: int
    rows: int
    wide: int
    groups: int
    chunk: int
    num_warps: int

    def name(self, kernel: str, dtype: str, channels_last: bool) -> str:
        """Return the name of the `Variant` for this launch of the kernel "whole", "statistics" or "normalise"."""
        align = _constants(self, channels_last)["ALIGN"]
        return (f"group_norm_{kernel}_{dtype}_{'nhwc' if channels_last else 'nchw'}"
                f"_{self.rows}x{self.wide}_g{self.groups}_a{align}_w{self.num_warps}")


PARTS = 256
"""The most parts that a group's statistics come in."""
TILE = 4096
"""Values in a tile of a split launch: 16 a thread."""
PROGRAMS = 512
"""Programs that a split launch aims for: about four for each multiprocessor of a large GPU."""
WHOLE = ((64, 16), (64, 64), (64, 128), (256, 16), (256, 64), (256, 128), (1024, 16))
"""Tiles [positions, channels] that hold whole groups in registers, smallest first: at most 64 values a thread."""


def whole_config(positions: int, per_group: int, channels_last: bool) -> Config | None:
    """Return the launch of the kernel that keeps a group in registers; None for a group that is too large for it."""
    cols = per_group
    while channels_last and cols % 8 and cols < 64:  # 16-byte loads, where a few groups together allow them
        cols *= 2
    for rows, wide in WHOLE:
        if positions <= rows and cols <= wide:
            return Config(cols, rows, wide, 8 if channels_last else 1, positions, min(16, max(4, rows * wide // 1024)))
    return None


def split_config(images: int, positions: int, channels: int, per_group: int, channels_last: bool) -> Config:
    """Return the launch of either kernel of a group that is split: TILE values a tile, about PROGRAMS programs.

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
    """Return the launches of one shape: for a group in registers one, with the pointers x, weight, bias and out.

    For a larger group two: statistics (x, parts; see `parts_shape`) and (x, weight, bias, parts, out).
    """
    per_group = channels // groups
    if cfg := whole_config(positions, per_group, channels_last):
        scalars = {"positions": positions, "channels": channels, "per_group": per_group, "cols": cfg.cols,
                   "silu": int(silu), "eps": eps}
        return (Launch(whole_kernel, (triton.cdiv(channels, cfg.cols), 1, images), scalars,
                       _constants(cfg, channels_last), cfg.num_warps, 1),)
    # Channels-first, a group is one run of values: for its statistics, a single channel of that many positions.
    run, members = (positions, per_group) if channels_last else (positions * per_group, 1)
    cfg = split_config(images, run, groups * members, members, channels_last)
    parts = triton.cdiv(run, cfg.chunk)
    statistics = Launch(
        statistics_kernel, (triton.cdiv(groups * members, cfg.cols), parts, images),
        {"positions": run, "channels": groups * members, "per_group": members, "cols": cfg.cols, "chunk": cfg.chunk},
        _constants(cfg, channels_last), cfg.num_warps, 1)
    cfg = split_config(images, positions, channels, per_group, channels_last)
    normalise = Launch(
        normalise_kernel, (triton.cdiv(channels, cfg.cols), triton.cdiv(positions, cfg.chunk), images),
        {"positions": positions, "channels": channels, "per_group": per_group, "cols": cfg.cols, "chunk": cfg.chunk,
         "parts": parts, "silu": int(silu), "eps": eps},
        {"PARTS": PARTS, **_constants(cfg, channels_last)}, cfg.num_warps, 1)
    return statistics, normalise


def parts_shape(images: int, groups: int, statistics: Launch) -> tuple[int, int, int, int]:
    """Return the shape of the statistics of a split group, float32: [images, (n, mean, M2), groups, parts]."""
    return images, 3, groups, statistics.grid[1]


def launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor, groups: int, eps: float,
           silu: bool = False) -> None:
    """Run the Triton kernels, which write `group_norm` into `out`, which has x's shape, dtype and strides.

    Raises ValueError or TypeError for what the kernels cannot do; the message says what it got and what they take.
    """
    check(x, weight, bias, groups)
    check_output("group_norm", whole_kernel, out, x, x.shape, x.stride())
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
    """Yield what the UNets and VAEs of SD 1.5, SD 2.1, SDXL and models/shapes launch, in both memory orders.

    In those every slab begins at a multiple of 8 channels, or is one channel; weight and bias have x's dtype.
    """
    seen = set()
    for dtype, last, per_group in itertools.product(OLDEST, (True, False), (4, 8, 10, 12, 16, 20, 24, 30, 40, 60, 80)):
        split = split_config(1, 2**20, 32 * per_group, per_group, last)
        whole = [cfg for positions in (64, 256, 1024) if (cfg := whole_config(positions, per_group, last))]
        launches = [("whole", whole_kernel, cfg) for cfg in whole]
        launches += [("statistics", statistics_kernel, split), ("normalise", normalise_kernel, split)]
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
    """Compute the group norm of x [images, channels, …] over `groups` groups of channels, then SiLU where asked for.

    x is fp16, bf16 or fp32, contiguous in channels-first or channels-last memory, and the result has its strides;
    weight and bias [channels] have its dtype or are fp32. Raises TypeError for dtypes, ValueError for the rest. On a
    CPU this is the reference.
    """
    check(x, weight, bias, groups)
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


def check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int) -> None:
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
