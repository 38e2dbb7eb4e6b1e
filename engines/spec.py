"""The words that every stage shares: tensor specs, engine configs, the `Engine` protocol and its error."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

DTYPES = ("fp32", "fp16", "bf16")

LEVELS = (2, 4, 8, 16)
"""What the size of the latents is divided by at the levels of a UNet below the first."""


class EngineError(RuntimeError):
    """A bundle or an engine that cannot be read, built, trusted or run. The message says got / expected / do."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a component: its name, numpy dtype name, and shape of ints and dimension names.

    Dimension names are those of `EngineConfig.dims`: batch, height, width (pixels), latent_height, latent_width,
    sequence (tokens), and latent_height_2, latent_width_2 … for the latents' size halved by each level of a UNet.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def resolve(self, dims: Mapping[str, int]) -> TensorSpec:
        """The same spec with every dimension a number. Raises EngineError for a name that `dims` does not have."""
        try:
            shape = tuple(d if isinstance(d, int) else dims[d] for d in self.shape)
        except KeyError as e:
            raise EngineError(f"tensor {self.name}: got dimension {e}, expected one of {sorted(dims)}") from e
        return dataclasses.replace(self, shape=shape)

    def empty(self) -> np.ndarray:
        """An uninitialised array of a resolved spec."""
        return np.empty(tuple(int(d) for d in self.shape), self.dtype)


@dataclass(frozen=True)
class EngineConfig:
    """What an engine is built for; passed whole, hashed whole into the cache key.

    backend: a name of `engines.BACKENDS`. dtype: the precision it computes in (its inputs and outputs are float32
    whatever this says). batch: rows of the engine's batch dimension. height, width: pixels of the picture, 0 for a
    component without them. latent_height, latent_width: the same in latents. sequence: tokens, 0 where there are none.
    device: "cpu", "cpu:avx2", "cuda:0", "sm_90" … as the backend understands it. threads: 0 leaves it to the backend.
    options: backend-specific settings, JSON values only.
    """

    backend: str
    dtype: str = "fp32"
    batch: int = 1
    height: int = 0
    width: int = 0
    latent_height: int = 0
    latent_width: int = 0
    sequence: int = 0
    device: str = "cpu"
    threads: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise EngineError(f"dtype: got {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        for name in ("batch", "height", "width", "latent_height", "latent_width", "sequence", "threads"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < (1 if name == "batch" else 0):
                raise EngineError(f"engine config {name}: got {value!r}, expected a whole number of at least "
                                  f"{1 if name == 'batch' else 0}")

    @property
    def dims(self) -> dict[str, int]:
        """Values of the dimension names that tensor specs use."""
        return {**{name: getattr(self, name)
                   for name in ("batch", "height", "width", "latent_height", "latent_width", "sequence")},
                **{f"{name}_{level}": getattr(self, name) // level
                   for level in LEVELS for name in ("latent_height", "latent_width")}}

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "options": dict(self.options)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of to_json. Unknown keys raise EngineError."""
        unknown = set(data) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise EngineError(f"engine config: got unknown keys {sorted(unknown)}, expected those of EngineConfig; "
                              "rebuild the engine with this version")
        return cls(**data)
