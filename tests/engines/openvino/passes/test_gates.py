"""A gated feed-forward in OpenVINO graphs: a product for each half, and weights cut in two that can be replaced."""

from typing import Any

import numpy as np
import pytest

from engines.onnx.initializers import FLOAT, Initializer
from engines.openvino.passes.gates import fold_halves, halve_gates
from engines.openvino.passes.weights import replace_weights
from tests.tools.openvino_graphs import kinds, model, outputs, parameter

ov = pytest.importorskip("openvino")
WEIGHT = np.random.default_rng(1).standard_normal((16, 12)).astype(np.float32)
BIAS = np.random.default_rng(2).standard_normal(16).astype(np.float32)


def graph(axis: int = 2, *, bias: bool = True, shared: bool = False, weight: np.ndarray = WEIGHT) -> Any:
    """a · gelu(b) for the halves a and b of x · weight + bias, [2, 6, 8] each."""
    opset = ov.opset13
    x = parameter("x", [2, 6, 12])
    y = opset.matmul(x, opset.constant(weight, name="w"), False, True)
    y = opset.add(y, opset.constant(BIAS, name="b")) if bias else y
    halves = opset.split(y, opset.constant(np.int64(axis)), 2)
    out = opset.multiply(halves.output(0), opset.gelu(halves.output(1), "erf"))
    return model([x], out, *([opset.relu(y)] if shared else []))


@pytest.mark.parametrize("axis", [2, -1])
def test_a_gate_has_a_product_of_its_own(axis: int) -> None:
    changed = graph(axis)
    expected = outputs(changed)
    assert halve_gates(ov, changed) == 1
    halves = [op for op in changed.get_ordered_ops() if op.get_type_name() == "MatMul"]
    assert [list(op.get_output_shape(0)) for op in halves] == [[2, 6, 8]] * 2
    np.testing.assert_allclose(outputs(changed)[0], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"axis": 1}, {"bias": False}, {"shared": True}], ids=str)
def test_a_split_of_something_else_stays(options: dict) -> None:
    same = graph(**options)
    assert halve_gates(ov, same) == 0
    assert kinds(same).count("MatMul") == 1


def test_halves_of_a_weight_are_constants_that_a_new_weight_replaces() -> None:
    changed = graph()
    halve_gates(ov, changed)
    assert fold_halves(ov, changed) == 2 and "Split" not in kinds(changed)  # weight and bias
    assert fold_halves(ov, changed) == 0
    names = {op.get_friendly_name() for op in changed.get_ordered_ops() if op.get_type_name() == "Constant"}
    assert names == {"w#half0", "w#half1", "b#half0", "b#half1"}
    new = WEIGHT[::-1].copy()
    known = {"w": Initializer(FLOAT, (16, 12), external=False)}
    assert replace_weights(ov, changed, {"w": new, "elsewhere": new}, known) == {"w"}
    expected = outputs(graph(weight=new))
    np.testing.assert_allclose(outputs(changed)[0], expected[0], rtol=1e-5, atol=1e-5)
