"""A 16-bit graph that computes in float32."""

import numpy as np
import pytest

from engines.openvino.passes.widen import widen
from tests.tools.openvino_graphs import model, outputs, parameter

ov = pytest.importorskip("openvino")


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_conversions_and_weights_become_float32(kind: str) -> None:
    opset = ov.opset13
    x = parameter("x", [2, 8])
    stored = opset.constant(np.random.default_rng(0).standard_normal((8, 8)).astype(np.float16))
    weight = stored if kind == "f16" else opset.convert(stored, "bf16")
    y = opset.matmul(opset.convert(x, kind), weight, False, False)
    graph = model([x], opset.convert(opset.add(y, opset.convert(opset.constant(np.float32(2048)), kind)), "f32"))
    widen(ov, graph)
    product = next(op for op in graph.get_ordered_ops() if op.get_type_name() == "MatMul")
    assert product.get_output_element_type(0).to_string() == "f32"
    rows = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    expected = rows @ stored.get_data().astype(np.float32) + 2048  # in 16 bits the sum would lose the fraction
    np.testing.assert_allclose(outputs(graph)[0], expected, rtol=1e-6)
