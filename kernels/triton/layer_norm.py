"""Layer norm over the last dim: y = (x − mean) / sqrt(var + eps) · weight + bias.

In fp32, with the row held in registers and centred before it is squared. Bytes moved: x read once, y written once;
weight and bias come from L2.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.aot.variant import Variant
from kernels.triton.checks import (
    OLDEST,
    archs_of,
    check_contiguous,
    check_dtype,
    check_output,
    check_shape,
    check_tensors,
)
from kernels.triton.traced import open_on_gpu, traceable

WIDTHS = (128, 192, 320, 640, 768, 1024, 1280)
"""Row lengths of the UNets and text encoders of SD 1.5, SD 2.1 and SDXL, and of models/shapes."""
LONGEST = 16384


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute `layer_norm` in plain torch. 16-bit inputs are computed in fp32 and rounded once; fp64 stays fp64."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
    return ((wide - mean) * torch.rsqrt(var + eps) * weight.to(wide.dtype) + bias.to(wide.dtype)).to(x.dtype)


@triton.jit
def _layer_norm_kernel(
    x_ptr: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor, out_ptr: tl.tensor, rows: tl.tensor, n: tl.tensor,
    eps: tl.tensor, ROWS: tl.constexpr, WIDE: tl.constexpr,
) -> None:
    """Normalise ROWS rows of n ≤ WIDE values."""
    first = tl.program_id(0) * ROWS
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDE)
    in_row = column < n
    exists = (first + row < rows) & in_row[None, :]
    offsets = tl.cast(first, tl.int64) * n + (row * n + column[None, :])
    x = tl.load(x_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / n
    centred = tl.where(in_row[None, :], x - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / n + eps)
    weight = tl.load(weight_ptr + column, mask=in_row, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=in_row, other=0.0).to(tl.float32)
    y = centred * scale[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=exists)


@dataclass(frozen=True)
class Config:
    """Rows of a program, the power of two that holds one, and warps."""

    rows: int
    wide: int
    num_warps: int

    def name(self, dtype: str) -> str:
        """Return the name of the `Variant` that is built for this launch."""
        return f"layer_norm_{dtype}_{self.rows}x{self.wide}"


def config(n: int) -> Config:
    """Return the launch for rows of n values: 16 values a thread, tiles of at least 2048."""
    wide = max(16, triton.next_power_of_2(n))
    return Config(max(1, 2048 // wide), wide, min(16, max(4, wide // 512)))


def launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor, eps: float) -> None:
    """Run the Triton kernel, which writes `layer_norm` into `out`, contiguous, of x's shape and dtype.

    Raises ValueError or TypeError for what the kernel cannot do; the message says what it got and what it takes.
    """
    check(x, weight, bias)
    check_output("layer_norm", _layer_norm_kernel, out, x, x.shape)
    n = x.shape[-1]
    rows, cfg = x.numel() // n, config(n)
    traceable(_layer_norm_kernel, out)[(triton.cdiv(rows, cfg.rows),)](
        x, weight, bias, out, rows, n, eps, ROWS=cfg.rows, WIDE=cfg.wide, num_warps=cfg.num_warps)


def variants() -> Iterator[Variant]:
    """Yield a variant for every power of two that holds rows of the shipped models; weight and bias have x's dtype."""
    for dtype, wide in itertools.product(OLDEST, dict.fromkeys(config(n).wide for n in WIDTHS)):
        cfg, pointers = config(wide), ("x_ptr", "weight_ptr", "bias_ptr", "out_ptr")
        yield Variant(
            op="layer_norm", name=cfg.name(dtype), kernel=_layer_norm_kernel,
            signature={**dict.fromkeys(pointers, f"*{dtype}"), "rows": "i32", "n": "i32", "eps": "fp32"},
            constants={"ROWS": cfg.rows, "WIDE": cfg.wide}, divisible=(*pointers, "n"), num_warps=cfg.num_warps,
            num_stages=1, archs=archs_of(dtype))


@torch.library.custom_op("latentrt::layer_norm", mutates_args=(), device_types="cpu",
                         schema="(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor")
def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute the layer norm of x […, n] over its last dim, contiguous, n ≤ 16384; weight and bias [n].

    x is fp16, bf16 or fp32; weight and bias have its dtype or are fp32. Raises TypeError for dtypes, ValueError for the
    rest. On a CPU this is the reference.
    """
    check(x, weight, bias)
    return reference(x, weight, bias, eps)


@layer_norm.register_kernel("cuda")
def _on_gpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    out = torch.empty_like(x)
    launch(x, weight, bias, out, eps)
    return out


open_on_gpu(layer_norm, _on_gpu)


@layer_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.empty_like(x)


def check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    check_tensors("layer_norm", x=x, weight=weight, bias=bias)
    if x.numel() == 0 or x.dim() < 1 or x.shape[-1] > LONGEST:
        raise ValueError(f"layer_norm: x: got shape {tuple(x.shape)}, expected at least one row, of 1 to {LONGEST} "
                         "values")
    check_shape("layer_norm", (x.shape[-1],), weight=weight, bias=bias)
    check_dtype("layer_norm", weight.dtype, bias=bias)
    if weight.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"layer_norm: weight: got {weight.dtype}, expected {x.dtype}, as x, or torch.float32")
    check_contiguous("layer_norm", x=x, weight=weight, bias=bias)
