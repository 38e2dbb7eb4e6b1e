"""Graphs of OpenVINO for the tests of its passes, and what they compute."""

from typing import Any

import numpy as np
import pytest

from engines.openvino import extension, vendor
from engines.spec import EngineError
from kernels.cpu import library


def _why_not() -> str | None:
    try:
        return extension.missing()
    except EngineError as e:
        return str(e)


needs_extension = pytest.mark.skipif(_why_not() is not None, reason=str(_why_not()))


def parameter(name: str, shape: list[int]) -> Any:
    """Return a float32 input of a graph."""
    node = vendor.package().opset13.parameter(shape, name=name)
    node.output(0).get_tensor().set_names({name})
    return node


def model(parameters: list[Any], *outputs: Any) -> Any:
    """Return a graph that gives `outputs`, in their order."""
    ov = vendor.package()
    return ov.Model([ov.opset13.result(x) for x in outputs], parameters, "graph")


def outputs(graph: Any, precision: str = "f32") -> list[np.ndarray]:
    """Return what a graph gives for seeded inputs, compiled with a precision hint ("f32", "bf16")."""
    core = vendor.package().Core()
    if library.EXTENSION.exists():
        extension.add_to(core)
    rng = np.random.default_rng(0)
    feed = {p.get_friendly_name(): rng.standard_normal(list(p.get_output_shape(0))).astype(np.float32)
            for p in graph.get_parameters()}
    compiled = core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    return [np.array(x) for x in compiled(feed).values()]


def kinds(graph: Any) -> list[str]:
    """Return the operators of a graph's nodes."""
    return [op.get_type_name() for op in graph.get_ordered_ops()]


def relative_rms(got: np.ndarray, expected: np.ndarray) -> float:
    """Return RMS of the difference over RMS of what was expected."""
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))
