"""Levels of a UNet of diffusers: the sizes there, and the residuals that a ControlNet gives for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engines.spec import TensorSpec

RESIDUAL = "residual"
"""Group of the tensors that ControlNets give and the UNet adds."""


def level_size(level: int) -> tuple[str, str]:
    """Return the names of height and width at a level, 0 for that of the latents."""
    end = f"_{2 ** level}" if level else ""
    return f"latent_height{end}", f"latent_width{end}"


def residual_specs(config: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    """Return residual_0 … of a UNet or ControlNet of this configuration: float32 [batch, C, h, w].

    Each is for a skip connection, in the order in which these are made, and the last for the middle. Height and width
    halve at each level.
    """
    channels, layers = config["block_out_channels"], config.get("layers_per_block", 2)
    layers = [layers] * len(channels) if isinstance(layers, int) else layers
    shapes = [(channels[0], 0)]
    for level, (width, count) in enumerate(zip(channels, layers, strict=True)):
        shapes += [(width, level)] * count
        if level + 1 < len(channels):
            shapes.append((width, level + 1))
    shapes.append((channels[-1], len(channels) - 1))
    return tuple(TensorSpec(f"{RESIDUAL}_{n}", "float32", ("batch", width, *level_size(level)), RESIDUAL)
                 for n, (width, level) in enumerate(shapes))
