"""Backends and engines as the rest of latentrt sees them, and which backends there are."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from engines.bundle.bundle import Bundle
from engines.bundle.manifest import Component
from engines.onnx.low_rank import Weight
from engines.spec import EngineConfig, EngineError, TensorSpec

BACKENDS = {
    "onnxruntime": "engines.onnxruntime.backend:ONNXRUNTIME",
    "openvino": "engines.openvino.backend:OPENVINO",
    "inductor": "engines.inductor.backend:INDUCTOR",
    "tensorrt": "engines.tensorrt.backend:ENTERPRISE",
    "tensorrt-rtx": "engines.tensorrt.backend:RTX",
}
"""Name of a backend → module and the `Backend` in it, which is imported when it is asked for."""


@dataclass(frozen=True)
class Target:
    """A target is one component of a bundle, and what an engine of it is built for.

    directory: the bundle's. name: the component's.
    """

    directory: Path
    name: str
    component: Component
    config: EngineConfig

    @classmethod
    def of(cls, bundle: Bundle, name: str, config: EngineConfig) -> Self:
        """Return the target of a component of `bundle`. Raises EngineError for one that it does not have."""
        return cls(bundle.path, name, bundle.component(name), config)

    @property
    def onnx(self) -> Path:
        """The path of the component's ONNX file."""
        return self.directory / self.component.file

    @property
    def inputs(self) -> dict[str, TensorSpec]:
        """The inputs at the config's static shapes: name → spec."""
        return {spec.name: spec.resolve(self.config.dims) for spec in self.component.inputs}

    @property
    def outputs(self) -> dict[str, TensorSpec]:
        """The outputs at the config's static shapes: name → spec."""
        return {spec.name: spec.resolve(self.config.dims) for spec in self.component.outputs}


@dataclass(frozen=True)
class Layer:
    """A layer is one step of a compiled engine.

    name: as the library calls it. type: what it computes. kernel: the implementation chosen. precision: of the kernel,
    in the library's words. seconds: median of its time in a call, None where it was not measured.
    """

    name: str
    type: str
    kernel: str
    precision: str
    seconds: float | None = None


class Engine(Protocol):
    """An engine is one compiled component with static shapes. Buffers are numpy arrays on CPUs, device memory on GPUs.

    gpu: number of the GPU that it runs on, None for the CPU. precision: what it computes in where that is not the
    config's dtype, such as "fp8". workspace_bytes: working memory of a run that other engines of the same stream may
    share. refittable: names of the weights that `refit` can replace, None where that is not known.
    """

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    gpu: int | None = None
    precision: str | None = None
    workspace_bytes: int = 0
    refittable: list[str] | None = None

    def bind(self, buffers: Mapping[str, Any]) -> None:
        """Fix the address of every input and output, once. Raises EngineError for a wrong name, dtype or shape."""
        ...

    def enqueue(self, stream: Any = None) -> None:
        """Run on the bound buffers, any number of times. On a CPU it returns when the outputs are written."""
        ...

    def refit(self, weights: Mapping[str, Weight]) -> None:
        """Give named initializers of the ONNX graph new values.

        Raises EngineError for an unknown name or shape, or where it cannot be done; then nothing has changed.
        """
        ...

    def use_workspace(self, buffer: Any) -> None:
        """Take working memory of at least `workspace_bytes`: its address, or a cuda.core Buffer."""
        raise EngineError("workspace: got some for an engine that shares none, expected none; leave it out")


class Backend(Protocol):
    """A library that compiles components. Only its folder imports the vendor's package, in functions.

    name: a key of BACKENDS. on_gpu: its engines are for a GPU and compute in the precision of the graph. in_parts: the
    runtime runs a denoiser in the parts of `export.passes.hoist` with it.
    """

    name: str
    on_gpu: bool = False
    in_parts: bool = True

    def available(self) -> str | None:
        """Return None where the library can be used, else what to do."""
        ...

    def devices(self) -> list[str]:
        """Return the devices that its engines can be for: "cpu", "cuda:0", "sm_89" …"""
        ...

    def dtypes(self) -> tuple[str, ...]:
        """Return the precisions that this machine computes in, the one to prefer first."""
        ...

    def versions(self, config: EngineConfig | None = None) -> dict[str, str]:
        """Return all that an engine depends on beside files and config; without a config, the library's version.

        Raises EngineError for a device that it cannot be for.
        """
        ...

    def build(self, target: Target, directory: Path) -> None:
        """Write into `directory` what `load` needs beside the ONNX file.

        Raises EngineError where the engine cannot be built.
        """
        ...

    def load(self, target: Target, directory: Path) -> Engine:
        """Open the engine that `build` made. Raises EngineError where it cannot be opened or run here."""
        ...

    def runnable(self, config: EngineConfig) -> str | None:
        """Return None where this machine can run the engine, else why not. What was built here runs here by default."""
        return None

    def reads_onnx(self, config: EngineConfig) -> bool:
        """Return whether `load` reads the bundle's ONNX files."""
        return True

    def refits(self, config: EngineConfig) -> bool:
        """Return whether a build has to show that new weights reach the engine (`engines.check.refit`)."""
        return False

    def details(self, directory: Path) -> dict[str, Any]:
        """Return what the build wrote down about the engine in `directory`, JSON values by name.

        Raises EngineError for a damaged file.
        """
        return {}

    def layers(self, target: Target, directory: Path, feed: Mapping[str, np.ndarray],
               calls: int) -> list[Layer] | None:
        """Return the layers of the engine in the order they run; None where the library does not tell.

        The engine is opened and run `calls` times on `feed` (name → array) after a first time. Times need counters that
        cost time themselves, so their sum is more than a call takes.
        """
        return None


def backend(name: str) -> Backend:
    """Return a backend of BACKENDS. Raises EngineError for an unknown name."""
    if name not in BACKENDS:
        raise EngineError(f"backend: got {name!r}, expected one of {', '.join(BACKENDS)}")
    module, _, attribute = BACKENDS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
