"""The settings of a pipeline: one frozen object, made where it is opened and passed whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from PIL import Image

from engines import Bundle, EngineError, backend
from engines.cli.options import setting
from engines.store.choose import choose
from runtime.request import checks
from runtime.request.checks import Check
from runtime.request.option import check_options, option

SafetyChecker = Callable[[Image.Image], Image.Image | None]
"""Sees a finished picture, and returns it or another one, or None to withhold it."""

DepthEstimator = Callable[[Image.Image], np.ndarray]
"""Gives a depth map, [H, W] in any unit, of a picture."""

SETTINGS = Check(lambda name, value: dict(value), setting, "NAME=VALUE")
"""Settings of a backend, such as {"fp8": "linear"}: a mapping, or pairs; kept as a dict."""


@dataclass(frozen=True)
class PipelineConfig:
    """A config is what a pipeline is opened with. Raises ValueError for a value that cannot be."""

    backend: str = option("auto", checks.text("NAME"), "engine to run, a name of `python -m engines list`",
                          flag="--backend", unset="the fastest measured here, or what is preferred; python -m engines "
                          "list BUNDLE says which and why")
    dtype: str = option("auto", checks.text("NAME"), "fp32, fp16, bf16 or auto: precision to compute in",
                        flag="--dtype")
    """"auto" is the fastest that the backend runs well here; a GPU runs the graph's own."""
    device: str = option("auto", checks.text("NAME"), "cpu, cuda:0 or auto, which is the one that the backend is for",
                         flag="--device")
    size: tuple[int, int] | None = option(None, checks.pair(1), "(height, width) in pixels of pictures that say no "
                                          "other", unset="the model's own")
    batch: int = option(1, checks.whole(1), "images denoised together", flag="--batch")
    threads: int = option(0, checks.whole(0), "CPU threads, 0 for all cores", flag="--threads")
    eager: bool = option(False, checks.boolean(), "no CUDA graphs", flag="--eager")
    progress: bool = option(True, checks.boolean(), "bars on a terminal")
    tile: int | None = option(None, checks.whole(1, 2**16), "larger pictures go through the first stage in overlapping "
                              "tiles of this side, which takes less memory", flag="--tile", metavar="PIXELS")
    options: Mapping[str, Any] = option(None, SETTINGS, "a setting of the backend, as python -m engines build has "
                                        "them", flag="--option", repeats=True)
    safety_checker: SafetyChecker | None = option(None, checks.function("a picture"), "sees every finished picture")
    depth_estimator: DepthEstimator | None = option(None, checks.function("a picture"), "is asked for the depth of the "
                                                    "picture of a request that has none but needs one")

    def __post_init__(self) -> None:
        check_options(self)
        object.__setattr__(self, "options", self.options or {})

    def chosen(self, bundle: Bundle) -> tuple[Self, str]:
        """Return the settings with the size and every "auto" filled in for a bundle here, and why they are so.

        Raises EngineError where no backend can be used, ValueError for a size or a tile that the model cannot have.
        """
        size = self.size or bundle.manifest.default_size
        bundle.check_size(*size)
        factor = bundle.manifest.latent.factor
        if self.tile is not None:
            checks.whole(4 * factor, 2**16)("tile", self.tile)
            if self.tile % factor:
                raise ValueError(f"tile: got {self.tile} pixels, expected a multiple of {factor}")
        name, dtype, device, why = choose(self.backend, self.dtype, self.device, bundle=bundle, size=size,
                                          batch=self.batch, threads=self.threads)
        own = bundle.dtype
        if backend(name).on_gpu and dtype != own:
            raise EngineError(f"dtype: got {dtype}, expected {own}, that of the graph, which {name} keeps; "
                              f"export the checkpoint with --dtype {dtype}")
        return dataclasses.replace(self, backend=name, dtype=dtype, device=device, size=size), why

    @property
    def pixels(self) -> tuple[int, int]:
        """The size, (height, width), of settings that `chosen` has filled in."""
        assert self.size
        return self.size
