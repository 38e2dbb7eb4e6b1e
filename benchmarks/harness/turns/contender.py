"""Contenders of a benchmark: who takes part, what all of them are given, and what is known of each."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import measure
from engines import Bundle

Run = Callable[[], Any]
"""One unit of work, such as a step; its result goes through a pipe."""


@dataclass(frozen=True)
class Workload:
    """The workload is what every contender of a run is given.

    height, width: pixels. batch: pictures at a time. cache: directory for what a contender keeps between two starts,
    empty before the first. fresh: the first start, which builds what later ones find. component: the largest that
    every contender holds. device: "cpu" or "cuda".
    """

    bundle: Path
    checkpoint: Path
    height: int
    width: int
    batch: int
    cache: Path
    fresh: bool = False
    component: str = "unet"
    device: str = "cpu"

    @property
    def float_bytes(self) -> int:
        """Bytes of the component's weights in float32, the largest part of what a contender holds."""
        bundle = Bundle.open(self.bundle)
        component = bundle.component(self.component)
        size = sum(os.path.getsize(bundle.path / file) for file in component.files)
        return size * (1 if component.dtype == "fp32" else 2)


@dataclass(frozen=True)
class Contender:
    """A contender is one implementation that is measured.

    load(workload): returns a Run that has run once and is at full speed. keeps: a second start finds what the first has
    built. backend: the backend of latentrt's engine, None for others' implementations. dtype: the precision that it
    computes in, where that decides whether it takes part. graph: the only precision of a bundle's graph that it runs.
    """

    load: Callable[[Any], Run]
    keeps: bool = False
    backend: str | None = None
    dtype: str | None = None
    graph: str | None = None


@dataclass(frozen=True)
class Timed:
    """A Run that measures itself returns this: seconds of one call, its result, memory taken on the GPU so far."""

    seconds: float
    result: Any
    gpu_bytes: int = 0


@dataclass
class Measured:
    """The state holds what is known of one contender so far.

    build_seconds: first start, with nothing built. load_seconds: a start that finds what was built. Both are from the
    first import to the end of the first call. seconds, results: one entry a call. peak_bytes: most resident memory,
    mapped weight files included. gpu_bytes: memory taken on the GPU, without CUDA's own context. left_out: why the
    contender could not be measured, None where it could.
    """

    build_seconds: float | None = None
    load_seconds: float | None = None
    seconds: list[float] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    peak_bytes: int = 0
    gpu_bytes: int = 0
    left_out: str | None = None

    def figures(self) -> dict[str, Any]:
        """Return everything but the results, for JSON; timings as their spread in seconds."""
        return {**(measure.spread(self.seconds) if self.seconds else {}), "build_seconds": self.build_seconds,
                "load_seconds": self.load_seconds, "peak_bytes": self.peak_bytes, "gpu_bytes": self.gpu_bytes,
                "left_out": self.left_out}
