"""The settings of a pipeline: one frozen object, made where it is opened and passed whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from PIL import Image

from engines import Bundle, EngineError, backend
from engines.store.choose import choose
from runtime.request import checks

SafetyChecker = Callable[[Image.Image], Image.Image | None]
"""Sees a finished picture, and returns it or another one, or None to withhold it."""

DepthEstimator = Callable[[Image.Image], np.ndarray]
"""Gives a depth map, [H, W] in any unit, of a picture."""


@dataclass(frozen=True)
class PipelineConfig:
    """What a pipeline is opened with.

    backend: a name of `engines.BACKENDS`, or "auto". dtype: "fp32", "fp16", "bf16", or "auto" for the fastest that the
    backend runs well here; a GPU runs the graph's own. device: "cpu", "cuda:0", or "auto" for the one that the backend
    is for. size: (height, width) pixels; the model's own by default. batch: images denoised together. threads: CPU
    threads, 0 for all cores. eager: no CUDA graphs. progress: bars on a terminal. tile: pixels; larger pictures go
    through the first stage in overlapping tiles of that side, in the memory of one (`runtime.pictures.tiles`).
    options: settings of the backend, such as {"fp8": "linear"}, as `python -m engines build --option` takes them.
    safety_checker: sees every finished picture. depth_estimator: is asked for the depth of the picture of a request
    that has none but needs one.

    Raises ValueError for a value that cannot be.
    """

    backend: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    size: tuple[int, int] | None = None
    batch: int = 1
    threads: int = 0
    eager: bool = False
    progress: bool = True
    tile: int | None = None
    options: Mapping[str, Any] | None = field(default=None)
    safety_checker: SafetyChecker | None = None
    depth_estimator: DepthEstimator | None = None

    def __post_init__(self) -> None:
        if isinstance(self.batch, bool) or not isinstance(self.batch, int) or self.batch < 1:
            raise ValueError(f"batch: got {self.batch!r}, expected a whole number of at least 1")
        object.__setattr__(self, "options", dict(self.options or {}))

    def chosen(self, bundle: Bundle) -> tuple[Self, str]:
        """Return the settings with the size and every "auto" filled in for a bundle on this machine, and why they are so.

        Raises EngineError where no backend can be used, ValueError for a size or a tile that the model cannot have.
        """
        size = self.size or bundle.manifest.default_size
        bundle.check_size(*size)
        factor = bundle.manifest.latent.factor
        if self.tile is not None:
            checks.whole("tile", self.tile, 4 * factor, 2**16)
            if self.tile % factor:
                raise ValueError(f"tile: got {self.tile} pixels, expected a multiple of {factor}")
        name, dtype, device, why = choose(self.backend, self.dtype, self.device, bundle=bundle, size=size,
                                          batch=self.batch, threads=self.threads)
        own = bundle.component("unet").dtype
        if backend(name).on_gpu and dtype != own:
            raise EngineError(f"dtype: got {dtype}, expected {own}, that of the graph, which {name} keeps; "
                              f"export the checkpoint with --dtype {dtype}")
        return dataclasses.replace(self, backend=name, dtype=dtype, device=device, size=size), why

    @property
    def pixels(self) -> tuple[int, int]:
        """The size, (height, width), of settings that `chosen` has filled in."""
        assert self.size
        return self.size
