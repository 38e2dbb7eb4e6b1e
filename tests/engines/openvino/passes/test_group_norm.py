"""Our group norm in OpenVINO graphs, with the SiLU that follows."""

from typing import Any

import numpy as np
import pytest

from engines.openvino import extension
from engines.openvino.backend import OPENVINO
from engines.openvino.engine import PRECISION
from engines.openvino.passes.bfloat16 import narrow
from engines.openvino.passes.group_norm import replace_group_norm
from tests.tolerances import ENGINE_REL_RMS
from tests.tools.openvino_graphs import kinds, model, needs_extension, outputs, parameter, relative_rms

ov = pytest.importorskip("openvino")


def graph(shape: tuple[int, ...] = (2, 24, 6, 5), *, silu: str = "sigmoid", shared: bool = False) -> Any:
    """Group norm of [batch, channels, …] in 4 groups, then x · sigmoid(x) as two nodes or one, or something else."""
    opset, rng = ov.opset13, np.random.default_rng(1)
    x = parameter("x", list(shape))
    weight, bias = (opset.constant(rng.standard_normal(shape[1]).astype(np.float32)) for _ in range(2))
    y = opset.group_normalization(x, weight, bias, 4, 1e-5)
    out = {"sigmoid": lambda: opset.multiply(opset.sigmoid(y), y), "swish": lambda: opset.swish(y), "none": lambda: y,
           "other": lambda: opset.add(opset.sigmoid(y), opset.multiply(y, np.float32(0.5)))}[silu]()
    return model([x], out, *([opset.relu(y)] if shared else []))


@needs_extension
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(2, 24, 6, 5), (1, 16, 7), (2, 8, 3, 4, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"silu": "swish"}, {"silu": "none"}, {"silu": "other"}, {"shared": True}],
                         ids=str)
def test_ours_replaces_a_group_norm(dtype: str, shape: tuple[int, ...], options: dict) -> None:
    if dtype not in OPENVINO.dtypes():
        pytest.skip(f"this CPU does not compute in {dtype}")
    changed = graph(shape, **options)
    expected = outputs(changed)
    assert replace_group_norm(ov, changed, extension.maker("GroupNormSilu")) == 1
    assert "GroupNormSilu" in kinds(changed) and "GroupNormalization" not in kinds(changed)
    fused = options in ({}, {"silu": "swish"})
    assert fused == (not {"Sigmoid", "Swish"} & {*kinds(changed)} and options.get("silu") != "none")
    for got, wanted in zip(outputs(changed, PRECISION[dtype]), expected, strict=True):
        assert relative_rms(got, wanted) < ENGINE_REL_RMS[dtype]


@needs_extension
def test_a_narrow_graph_is_float32_outside_and_in_the_affine_of_our_norm() -> None:
    narrowed = graph()
    replace_group_norm(ov, narrowed, extension.maker("GroupNormSilu"))
    narrow(ov, narrowed)
    types = {op.get_type_name(): op.get_output_element_type(0).to_string() for op in narrowed.get_ordered_ops()}
    assert types["Parameter"] == types["Result"] == "f32" and types["GroupNormSilu"] == "bf16"
    norm = next(op for op in narrowed.get_ordered_ops() if op.get_type_name() == "GroupNormSilu")
    assert [value.get_element_type().to_string() for value in norm.input_values()] == ["bf16", "f32", "f32"]
