"""Decoder output to pictures: out = round(255 · clamp(x / 2 + 1/2, 0, 1)), NCHW to NHWC, one byte a channel.

Rounds half to even, like numpy, so a picture has the same bytes as one made on a CPU. Bytes moved: the input once and
one byte per value out; 6.3 MB in and 3.1 MB out for 1024×1024 in 16 bits.

Channels first: a thread takes four neighbouring pixels at a time, whose twelve bytes are three 32-bit words to store
instead of twelve bytes at a distance of three. Channels last: the order stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.aot.variant import Variant
from kernels.triton.checks import DTYPES, archs_of, check_tensors

OP = "to_image"


def reference(x: torch.Tensor) -> torch.Tensor:
    """Compute `to_image` in plain torch, in fp32 (fp64 stays fp64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    unit = (x.to(wide) * 0.5 + 0.5).clamp(0, 1).nan_to_num(0)
    return (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@triton.jit
def _to_byte(x: tl.tensor) -> tl.tensor:
    """Return one value of a picture as int32; what is not a number becomes 0.

    Only compared, never subtracted: a compiler may fuse a product with the difference that follows and round less.
    """
    unit = x.to(tl.float32) * 0.5 + 0.5
    scaled = tl.where(unit > 0.0, tl.minimum(unit, 1.0), 0.0) * 255.0
    whole = tl.floor(scaled)
    half = whole + 0.5
    byte = whole.to(tl.int32)
    up = (scaled > half) | ((scaled == half) & (byte % 2 == 1))
    return byte + up.to(tl.int32)


@triton.jit
def _planes(x_ptr: tl.tensor, out_ptr: tl.tensor, pixels: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Convert channels-first memory. out_ptr: the picture as 32-bit words."""
    groups = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    offsets = groups[:, None] * 4 + tl.arange(0, 4)[None, :]
    mask = offsets < pixels
    x_ptr += tl.program_id(1).to(tl.int64) * 3 * pixels
    red = _to_byte(tl.load(x_ptr + offsets, mask=mask, other=0.0))
    green = _to_byte(tl.load(x_ptr + pixels + offsets, mask=mask, other=0.0))
    blue = _to_byte(tl.load(x_ptr + 2 * pixels + offsets, mask=mask, other=0.0))
    even, odd = tl.split(tl.reshape(red, (BLOCK, 2, 2)))
    red0, red2 = tl.split(even)
    red1, red3 = tl.split(odd)
    even, odd = tl.split(tl.reshape(green, (BLOCK, 2, 2)))
    green0, green2 = tl.split(even)
    green1, green3 = tl.split(odd)
    even, odd = tl.split(tl.reshape(blue, (BLOCK, 2, 2)))
    blue0, blue2 = tl.split(even)
    blue1, blue3 = tl.split(odd)
    words = out_ptr + (tl.program_id(1).to(tl.int64) * (pixels // 4) + groups) * 3
    inside = groups * 4 < pixels
    tl.store(words, red0 | green0 << 8 | blue0 << 16 | red1 << 24, mask=inside)
    tl.store(words + 1, green1 | blue1 << 8 | red2 << 16 | green2 << 24, mask=inside)
    tl.store(words + 2, blue2 | red3 << 8 | green3 << 16 | blue3 << 24, mask=inside)


@triton.jit
def _interleaved(x_ptr: tl.tensor, out_ptr: tl.tensor, values: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Convert channels-last memory."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < values
    byte = _to_byte(tl.load(x_ptr + offsets, mask=mask, other=0.0))
    tl.store(out_ptr + offsets, byte.to(tl.uint8), mask=mask)


@dataclass(frozen=True)
class Config:
    """Launch configuration. block: groups of four pixels (channels first) or values (channels last) of one program."""

    block: int
    num_warps: int


def config(channels_last: bool) -> Config:
    """Return the configuration for a layout, for all sizes, GPUs and dtypes: at most 16 values a thread."""
    return Config(block=2048, num_warps=4) if channels_last else Config(block=128, num_warps=4)


def launch(x: torch.Tensor) -> torch.Tensor:
    """Run `to_image` as one Triton kernel. Raises TypeError and ValueError as `to_image` does."""
    channels_last = check(x)
    images, _, height, width = x.shape
    pixels = height * width
    out = torch.empty((images, height, width, 3), dtype=torch.uint8, device=x.device)
    shape = config(channels_last)
    if channels_last:
        check_tensors(OP, _interleaved, x=x)
        grid: tuple[int, ...] = (triton.cdiv(x.numel(), shape.block),)
        _interleaved[grid](x, out, x.numel(), BLOCK=shape.block, num_warps=shape.num_warps)
    else:
        check_tensors(OP, _planes, x=x)
        grid = (triton.cdiv(pixels, 4 * shape.block), images)
        _planes[grid](x, out.view(-1).view(torch.int32), pixels, BLOCK=shape.block, num_warps=shape.num_warps)
    return out


def check(x: torch.Tensor) -> bool:
    """Return whether the channels are last. Raises TypeError for a wrong dtype, ValueError for a shape or layout."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{OP}: x: got {x.dtype}, expected one of {', '.join(map(str, DTYPES))}; "
                        "convert it with .to(torch.float32)")
    if x.ndim != 4 or x.shape[1] != 3 or 0 in x.shape:
        raise ValueError(f"{OP}: x: got shape {tuple(x.shape)}, expected [images, 3, height, width]")
    if x.is_contiguous(memory_format=torch.channels_last):
        return True
    if not x.is_contiguous():
        raise ValueError(f"{OP}: x: got shape {tuple(x.shape)} with strides {x.stride()}, expected channels first or "
                         "channels last without gaps; call .contiguous()")
    if x.shape[2] * x.shape[3] % 4:
        raise ValueError(f"{OP}: x: got {x.shape[2]}x{x.shape[3]} pixels, expected a multiple of four, as every "
                         "decoder gives; call .contiguous(memory_format=torch.channels_last)")
    return False


@torch.library.custom_op("latentrt::to_image", mutates_args=(), device_types="cpu")
def to_image(x: torch.Tensor) -> torch.Tensor:
    """Make pictures of a VAE's output.

    x: fp16, bf16 or fp32 [images, 3, height, width], −1 black to 1 white, values outside are clamped; channels first
    (height · width a multiple of four) or channels last. Returns uint8 [images, height, width, 3].

    Raises TypeError and ValueError saying what was expected.
    """
    check(x)
    return reference(x)


to_image.register_kernel("cuda")(launch)


@to_image.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], x.shape[2], x.shape[3], 3), dtype=torch.uint8)


def variants() -> Iterator[Variant]:
    """Yield every dtype of the decoder × both layouts; pictures of any size whose pixels are a multiple of 16."""
    for dtype in DTYPES.values():
        for kernel, layout, size, out in ((_planes, "planes", "pixels", "*i32"),
                                          (_interleaved, "interleaved", "values", "*u8")):
            shape = config(channels_last=kernel is _interleaved)
            yield Variant(OP, f"to_image_{dtype}_{layout}", kernel,
                          signature={"x_ptr": f"*{dtype}", "out_ptr": out, size: "i32"},
                          constants={"BLOCK": shape.block}, divisible=("x_ptr", "out_ptr", size),
                          num_warps=shape.num_warps, archs=archs_of(dtype))
