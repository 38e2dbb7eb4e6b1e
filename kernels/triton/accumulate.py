"""Sum of what several ControlNets give: out = x + (out where `keep` is not 0), over flat numbers.

Bytes moved: x once in, out once in (not for the first net, whose `keep` is 0) and once out; 161 MB for a guided picture
of Stable Diffusion 1.5 at 512×512, and 107 MB for the first net. All residuals of a net are one launch, as they lie in
one block of memory in the order of the UNet's inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from kernels.aot.variant import Variant
from kernels.triton.checks import archs_of, check_contiguous, check_device, check_dtype, check_shape, check_tensors

OP = "accumulate"
BLOCK = 1024
"""Numbers of one program, on every GPU."""


def reference(x: torch.Tensor, keep: torch.Tensor, out: torch.Tensor) -> None:
    """Compute `accumulate` in plain torch."""
    out.copy_(out + x if keep.item() else x)


@triton.jit
def _accumulate(x_ptr: tl.tensor, keep_ptr: tl.tensor, out_ptr: tl.tensor, n: tl.tensor, BLOCK: tl.constexpr) -> None:
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    total = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    if tl.load(keep_ptr) != 0:  # what is not kept is not read: it may be anything
        total += tl.load(out_ptr + offsets, mask=mask, other=0.0)
    tl.store(out_ptr + offsets, total, mask=mask)


def launch(x: torch.Tensor, keep: torch.Tensor, out: torch.Tensor) -> None:
    """Run `accumulate` as one Triton kernel. Raises TypeError and ValueError as `check` does."""
    check(x, keep, out)
    check_tensors(OP, _accumulate, x=x)
    _accumulate[(triton.cdiv(len(x), BLOCK),)](x, keep, out, len(x), BLOCK=BLOCK, num_warps=4)


def check(x: torch.Tensor, keep: torch.Tensor, out: torch.Tensor) -> None:
    """Raise TypeError for a wrong dtype, ValueError for a wrong shape, device or layout."""
    if x.ndim != 1 or not len(x):
        raise ValueError(f"{OP}: x: got shape {tuple(x.shape)}, expected [numbers]; call .reshape(-1)")
    check_shape(OP, tuple(x.shape), out=out)
    check_shape(OP, (1,), keep=keep)
    check_dtype(OP, torch.float32, x=x, out=out)
    check_dtype(OP, torch.int32, keep=keep)
    check_contiguous(OP, x=x, keep=keep, out=out)
    check_device(OP, "x", x.device, keep=keep, out=out)


@torch.library.custom_op("latentrt::accumulate", mutates_args=("out",), device_types="cpu")
def accumulate(x: torch.Tensor, keep: torch.Tensor, out: torch.Tensor) -> None:
    """Add x to `out` in place, or put it there.

    x, out: fp32 [numbers]. keep: int32 [1], 0 where what is in `out` is not to be kept.

    Everything is contiguous and on one device. Raises TypeError and ValueError saying what was expected.
    """
    check(x, keep, out)
    reference(x, keep, out)


accumulate.register_kernel("cuda")(launch)


@accumulate.register_fake
def _(x: torch.Tensor, keep: torch.Tensor, out: torch.Tensor) -> None:
    check(x, keep, out)


def variants() -> Iterator[Variant]:
    """Yield the only variant, since engines give float32."""
    yield Variant(OP, "accumulate_fp32", _accumulate,
                  signature={"x_ptr": "*fp32", "keep_ptr": "*i32", "out_ptr": "*fp32", "n": "i32"},
                  constants={"BLOCK": BLOCK}, divisible=("x_ptr", "keep_ptr", "out_ptr"), num_warps=4,
                  archs=archs_of("fp32"))
