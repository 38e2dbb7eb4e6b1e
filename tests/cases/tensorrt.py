"""Configs and requests for the tests of TensorRT, and why those are skipped."""

from pathlib import Path
from typing import Any

import pytest

import engines
from engines.bundle import Bundle
from engines.spec import EngineConfig, EngineError
from engines.tensorrt.backend import RTX
from engines.tensorrt.build import BuildRequest
from tests.conftest import why_no_gpu

needs_rtx = pytest.mark.skipif(RTX.available() is not None, reason=str(RTX.available()))
without_gpu = pytest.mark.skipif(why_no_gpu() is None, reason="is about a machine without an NVIDIA GPU")


def config(bundle: Bundle, component: str = "unet", **rest: Any) -> EngineConfig:
    """Return a config of two rows of 64x64 pixels, TensorRT-RTX on sm_89 in the graph's precision, but for `rest`."""
    values = {"backend": "tensorrt-rtx", "device": "sm_89", "size": (64, 64), "batch": 2,
              "dtype": bundle.component(component).dtype}
    return bundle.config(component, **{**values, **rest})


def unet_request(bundle: Bundle, directory: Path | str = "") -> BuildRequest:
    """Return the request that builds the UNet for that config, without options."""
    component, dims = bundle.component("unet"), config(bundle).dims
    inputs, outputs = ({s.name: tuple(map(int, s.resolve(dims).shape)) for s in specs}
                       for specs in (component.inputs, component.outputs))
    return BuildRequest("tensorrt-rtx", str(bundle.path / component.file), inputs, outputs, str(directory), "sm_89")


def for_this_gpu(name: str) -> None:
    """Skip the test where this backend cannot build for the GPU of this machine."""
    backend = engines.backend(name)
    if reason := backend.available():
        pytest.skip(reason)
    try:
        backend.versions(EngineConfig(name, {}, device="cuda:0"))
    except EngineError as e:
        pytest.skip(str(e))
