"""Shapes that kernels are tested and measured on, and the error that they may have there.

The shapes are those of models: SD 1.5, SD 2.1, SDXL and their VAEs. A UNet's batch of 2 is one image with guidance.
Latents are 64x64 for SD 1.5 (512x512 pixels), 96x96 for SD 2.1 (768x768) and 128x128 for SDXL (1024x1024).
"""

from __future__ import annotations

from dataclasses import dataclass

TRITON_FLOOR = {"fp16": 1e-4, "bf16": 8e-4, "fp32": 1e-6}
"""Output's dtype → floor of the error of a Triton kernel: a fifth of a rounding in 16 bits, seventeen of the far
smaller ones in fp32."""
CPP_FLOOR = {"fp16": 2.5e-4, "bf16": 2e-3, "fp32": 1e-6}
"""Output's dtype → floor of the error of a C++ kernel: one rounding or so."""


def most_error(framework: float, truth: float, floor: float) -> float:
    """Return the largest error that a kernel may have: twice the framework's own in the same dtype, plus a floor.

    framework: error of the framework's result, and truth: the truth itself, both in the norm of the error (RMS, or the
    largest magnitude). floor: share of the truth.
    """
    return 2 * framework + floor * truth


@dataclass(frozen=True)
class Attention:
    """q [batch, n_q, heads, head_dim], k and v [batch, n_k, heads, head_dim]."""

    model: str
    batch: int
    heads: int
    n_q: int
    n_k: int
    head_dim: int
    causal: bool = False

    def __str__(self) -> str:
        return f"{self.model}-{self.batch}x{self.heads}x{self.n_q}x{self.n_k}x{self.head_dim}"

    @property
    def flops(self) -> int:
        """Operations of the two matrix products, without the masked half of a causal one."""
        return 4 * self.batch * self.heads * self.n_q * self.n_k * self.head_dim // (2 if self.causal else 1)


@dataclass(frozen=True)
class GroupNorm:
    """x [images, channels, height, width], then SiLU or not."""

    model: str
    images: int
    channels: int
    height: int
    width: int
    eps: float
    silu: bool
    groups: int = 32

    def __str__(self) -> str:
        return f"{self.model}-{self.images}x{self.channels}x{self.height}x{self.width}{'-silu' if self.silu else ''}"

    @property
    def values(self) -> int:
        """Values that are read at least once, and written."""
        return self.images * self.channels * self.height * self.width


@dataclass(frozen=True)
class LayerNorm:
    """x [rows, n]."""

    model: str
    rows: int
    n: int

    def __str__(self) -> str:
        return f"{self.model}-{self.rows}x{self.n}"


@dataclass(frozen=True)
class Geglu:
    """x [rows, 2n], out [rows, n]."""

    model: str
    rows: int
    n: int

    def __str__(self) -> str:
        return f"{self.model}-{self.rows}x{self.n}"


@dataclass(frozen=True)
class Latents:
    """guidance_step on `images` latents of 4 channels, with guidance and a memory of 3 arrays."""

    model: str
    images: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.model}-{self.images}x4x{self.height}x{self.width}"


@dataclass(frozen=True)
class Pictures:
    """to_image on `images` pictures."""

    model: str
    images: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.model}-{self.images}x3x{self.height}x{self.width}"


ATTENTION = (
    *(Attention("sd15", 2, 8, n, n_k, d)
      for n, d in ((4096, 40), (1024, 80), (256, 160), (64, 160)) for n_k in (n, 77)),
    *(Attention("sd21", 2, heads, n, n_k, 64)
      for n, heads in ((9216, 5), (2304, 10), (576, 20), (144, 20)) for n_k in (n, 77)),
    *(Attention("sdxl", 2, heads, n, n_k, 64) for n, heads in ((4096, 10), (1024, 20)) for n_k in (n, 77)),
    Attention("sd15-two-prompts", 2, 8, 4096, 154, 40),
    Attention("sd15-cross-frame", 2, 8, 4096, 8192, 40),
    Attention("vae512", 1, 1, 4096, 4096, 512),
    Attention("vae1024", 1, 1, 16384, 16384, 512),
    Attention("clip-l", 2, 12, 77, 77, 64, causal=True),
    Attention("clip-bigg", 2, 20, 77, 77, 64, causal=True),
)

GROUP_NORM = (
    *(GroupNorm("sd15", 2, channels, size, size, 1e-5, True)
      for size, wide in ((64, (320, 640, 960)), (32, (320, 640, 960, 1280, 1920)), (16, (640, 1280, 1920, 2560)),
                         (8, (1280, 2560))) for channels in wide),
    *(GroupNorm("sd15-attention", 2, channels, size, size, 1e-6, False)
      for size, channels in ((64, 320), (32, 640), (16, 1280), (8, 1280))),
    *(GroupNorm("sd21", 2, channels, size, size, 1e-5, True)
      for size, channels in ((96, 320), (48, 640), (24, 1280), (12, 1280))),
    *(GroupNorm("sdxl", 2, channels, size, size, 1e-5, True)
      for size, wide in ((128, (320, 640, 960)), (64, (640, 1280, 1920)), (32, (1280, 2560))) for channels in wide),
    *(GroupNorm("vae512", 1, channels, size, size, 1e-6, True)
      for size, channels in ((64, 512), (128, 512), (256, 512), (256, 256), (512, 256), (512, 128))),
    *(GroupNorm("vae1024", 1, channels, size, size, 1e-6, True)
      for size, channels in ((512, 512), (512, 256), (1024, 256), (1024, 128))),
    GroupNorm("vae1024-attention", 1, 512, 128, 128, 1e-6, False),
)

LAYER_NORM = (
    *(LayerNorm("sd15", 2 * n, width) for n, width in ((4096, 320), (1024, 640), (256, 1280), (64, 1280))),
    *(LayerNorm("sd21", 2 * n, width) for n, width in ((9216, 320), (2304, 640), (576, 1280), (144, 1280))),
    *(LayerNorm("sdxl", 2 * n, width) for n, width in ((4096, 640), (1024, 1280))),
    *(LayerNorm(model, 2 * 77, width) for model, width in (("clip-l", 768), ("clip-h", 1024), ("clip-bigg", 1280))),
)

GEGLU = (
    *(Geglu("sd15", 2 * n, 4 * width) for n, width in ((4096, 320), (1024, 640), (256, 1280), (64, 1280))),
    *(Geglu("sd21", 2 * n, 4 * width) for n, width in ((9216, 320), (2304, 640), (576, 1280), (144, 1280))),
    *(Geglu("sdxl", 2 * n, 4 * width) for n, width in ((4096, 640), (1024, 1280))),
)

_SIZES = (("sd15", 64), ("sd21", 96), ("sdxl", 128))

GUIDANCE_STEP = tuple(Latents(model, images, n, n) for model, n in _SIZES for images in (1, 4))

TO_IMAGE = tuple(Pictures(model, images, 8 * n, 8 * n) for model, n in _SIZES for images in (1, 4))
