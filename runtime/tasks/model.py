"""The model as tasks see it: its manifest, its networks, and the latents of pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engines import TensorSpec
from engines.bundle import Manifest
from runtime.networks.denoiser import Denoiser
from runtime.networks.first_stage import Encoded


@dataclass(frozen=True)
class Model:
    """The parts of a model that tasks use.

    encode: a picture, float32 [3, height, width] in [-1, 1], to its latents. net: an attached ControlNet by its name.
    """

    manifest: Manifest
    denoiser: Denoiser
    encode: Callable[[np.ndarray], Encoded]
    net: Callable[[str], Denoiser]

    def input(self, name: str) -> TensorSpec:
        """Return the specification of an input of the denoiser."""
        return next(spec for component in self.manifest.components.values() if component.role == "denoiser"
                    for spec in component.inputs if spec.name == name)
