"""Sines and cosines of inputs, which a model of their own computes in float32."""

from typing import Any

import numpy as np
import pytest

from engines.openvino.passes.angles import cut_angles
from tests.tools.openvino_graphs import kinds, model, outputs, parameter

ov = pytest.importorskip("openvino")


def graph() -> Any:
    """x + (sines, then cosines, of the timestep at four frequencies) · 1. Nothing here holds on to its nodes."""
    opset = ov.opset13
    timestep, x = parameter("timestep", [2, 1]), parameter("x", [2, 8])
    angle = opset.multiply(timestep, np.geomspace(1, 1e-4, 4, dtype=np.float32)[None])
    time = opset.concat([opset.sin(angle), opset.cos(angle)], 1)
    return model([timestep, x], opset.add(x, opset.matmul(time, np.eye(8, dtype=np.float32), False, False)))


def test_the_angles_of_an_input_are_computed_apart() -> None:
    rest, whole = graph(), graph()
    angles = cut_angles(ov, rest)
    assert {"Sin", "Cos"} <= {*kinds(angles)} and not {"Sin", "Cos"} & {*kinds(rest)}
    assert [p.get_friendly_name() for p in angles.get_parameters()] == ["timestep"]
    assert [p.get_friendly_name() for p in rest.get_parameters()] == ["x", "angle0", "angle1"]
    feed = {"timestep": np.array([[999], [3]], np.float32), "x": np.random.default_rng(0).random((2, 8), np.float32)}
    compiled = {name: ov.Core().compile_model(m, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
                for name, m in (("angles", angles), ("rest", rest), ("whole", whole))}
    given = {port.get_any_name(): value for port, value in compiled["angles"]({"timestep": feed["timestep"]}).items()}
    got, = compiled["rest"]({"x": feed["x"], **given}).values()
    expected, = compiled["whole"](feed).values()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_the_sine_of_a_product_stays() -> None:
    x = parameter("x", [2, 4])
    graph = model([x], ov.opset13.sin(ov.opset13.matmul(x, np.eye(4, dtype=np.float32), False, False)))
    assert cut_angles(ov, graph) is None and "Sin" in kinds(graph)
    assert np.isfinite(outputs(graph)[0]).all()
