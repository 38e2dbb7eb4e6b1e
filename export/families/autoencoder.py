"""The VAE (AutoencoderKL) as two graphs, and what one must be to take the place of a bundle's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from engines.bundle import LatentSpec
from engines.spec import TensorSpec
from export.errors import ExportError
from export.trace.traced_module import TracedModule


class VAEDecoder(TracedModule):
    """Latents as the UNet knows them → picture, nominally in [-1, 1] and not clamped."""

    source = "vae"
    role = "first_stage_decoder"
    rows = 1  # at a time: no slower than several, and in the memory of one

    def __init__(self, model: nn.Module, latent: LatentSpec) -> None:
        super().__init__(model)
        self.latent = latent
        self.inputs = (TensorSpec("latents", "float32", ("batch", latent.channels, "latent_height", "latent_width")),)
        self.outputs = (TensorSpec("image", "float32", ("batch", 3, "height", "width")),)

    @property
    def used(self) -> nn.Module:
        return self.model.decoder

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        latents = latents / self.latent.scale + self.latent.shift
        return self.model.decode(latents.to(self.dtype), return_dict=False)[0].float()


class VAEEncoder(TracedModule):
    """Picture in [-1, 1] → mean and std of its latents as the UNet knows them: latents = mean + std · noise."""

    source = "vae"
    role = "first_stage_encoder"
    rows = 1

    def __init__(self, model: nn.Module, latent: LatentSpec) -> None:
        super().__init__(model)
        self.latent = latent
        shape = ("batch", latent.channels, "latent_height", "latent_width")
        self.inputs = (TensorSpec("image", "float32", ("batch", 3, "height", "width")),)
        self.outputs = (TensorSpec("mean", "float32", shape), TensorSpec("std", "float32", shape))

    @property
    def used(self) -> nn.Module:
        return self.model.encoder

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latent = self.model.encode(image.to(self.dtype), return_dict=False)[0]
        mean, std = latent.mean.float(), latent.std.float()
        return (mean - self.latent.shift) * self.latent.scale, std * self.latent.scale


def precision(config: Mapping[str, Any], dtype: str, wide: bool) -> str:
    """Return the precision of a VAE of this configuration in a bundle of `dtype`: bf16 for fp16 where that overflows.

    wide: whether it is of a model whose pipelines of diffusers decode in float32, as those of XL and the upscaler do.
    """
    return "bf16" if dtype == "fp16" and wide and config.get("force_upcast", True) else dtype


def pixels_a_latent(config: Mapping[str, Any]) -> int:
    """Return how many pixels of a side one latent is of: each level but the last halves it."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def require_same_latents(where: str, config: Mapping[str, Any], latent: LatentSpec) -> None:
    """Raise ExportError unless a VAE's latents are those of a bundle."""
    for key, got, expected in (
            ("latent_channels", config["latent_channels"], latent.channels),
            ("scaling_factor", float(config["scaling_factor"]), latent.scale),
            ("shift_factor", float(config["shift_factor"] or 0), latent.shift),
            ("pixels a latent", pixels_a_latent(config), latent.factor)):
        if got != expected:
            raise ExportError(f"{where}: got a VAE with {key}={got!r}, expected {expected!r}; it is for other latents "
                              "than the bundle's")
