"""Stable Diffusion in the words of a manifest: the only place that knows what its components and conditions mean."""

from __future__ import annotations

from engines.bundle import DimSpec


def dims(factor: int, multiple: int) -> dict[str, DimSpec]:
    """Return the dimensions of the graphs that follow from the size of the picture.

    factor: pixels a latent. multiple: by what a UNet has halved the latents at its last level.
    """
    levels = [2 ** n for n in range(1, multiple.bit_length())]
    return {dim: spec for side in ("height", "width") for dim, spec in (
        (f"latent_{side}", DimSpec(side, factor)),
        *((f"latent_{side}_{level}", DimSpec(f"latent_{side}", level)) for level in levels))}
