"""Weights of a graph that becomes one of bfloat16."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from engines.openvino.passes.bfloat16 import narrow
from tests.tools.openvino_graphs import model

ov = pytest.importorskip("openvino")


def constant(values: np.ndarray, kind: str) -> Any:
    if kind != "bf16":
        return ov.opset13.constant(values.astype({"f32": np.float32, "f16": np.float16}[kind]))
    tensor = ov.Tensor(ov.Type.bf16, ov.Shape(list(values.shape)))
    tensor.data.view(np.uint16)[...] = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    return ov.op.Constant(tensor)


def narrowed(weights: Any) -> np.ndarray:
    """The constant that `narrow` makes of a weight of float32, or converted to it."""
    x = ov.opset13.parameter(list(weights.get_output_shape(0)), name="x")
    graph = model([x], ov.opset13.add(x, weights))
    narrow(ov, graph)
    found = next(op for op in graph.get_ordered_ops() if op.get_type_name() == "Constant")
    return found.get_data().view(np.uint16).view(ml_dtypes.bfloat16)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_weights_are_rounded_to_the_nearest(kind: str) -> None:
    """As ml_dtypes rounds, ties to even; the largest float32 stays finite, and what was not finite stays that."""
    random = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    values = np.concatenate([random, [0.0, -0.0, 1.00390625, 1.01171875, np.inf, -np.inf, np.nan]]).astype(np.float32)
    weights = constant(values, kind)
    got = narrowed(weights if kind == "f32" else ov.opset13.convert(weights, "f32"))
    stored = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[kind]
    expected = values.astype(stored).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(got.astype(np.float32), expected.astype(np.float32))


def test_the_largest_weight_stays_finite() -> None:
    largest = np.finfo(np.float32).max
    bits = narrowed(constant(np.array([largest, -largest]), "f32")).astype(np.float64)
    assert np.isfinite(bits).all() and bits[0] == -bits[1] > 3.3e38
