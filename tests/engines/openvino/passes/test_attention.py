"""Our attention in OpenVINO graphs: put where it computes the same, left out where not."""

from typing import Any

import numpy as np
import pytest

from engines.openvino import extension
from engines.openvino.backend import OPENVINO
from engines.openvino.engine import PRECISION
from engines.openvino.passes.attention import replace_attention
from tests.tolerances import ENGINE_REL_RMS
from tests.tools.openvino_graphs import kinds, model, needs_extension, outputs, parameter, relative_rms

ov = pytest.importorskip("openvino")


def graph(head_dim: int = 40, *, keys: int = 24, swapped: bool = True, causal: bool = False, scale: float | None = None,
          mask: float | None = None, dense_mask: bool = False, two_users: bool = False) -> Any:
    """softmax(q kᵀ) v of [2, tokens, 3, head_dim] if `swapped`, else of [2, 3, tokens, head_dim]."""
    opset = ov.opset13
    shape = (lambda n: [2, n, 3, head_dim]) if swapped else (lambda n: [2, 3, n, head_dim])
    inputs = [parameter(name, shape(n)) for name, n in (("q", 16), ("k", keys), ("v", keys))]
    q, k, v = (opset.transpose(x, [0, 2, 1, 3]) if swapped else x for x in inputs)
    rest = {}
    if scale is not None or mask is not None or dense_mask:
        values = np.random.default_rng(1).standard_normal((16, keys)) if dense_mask else mask or 0.0
        rest["attention_mask"] = opset.constant(np.float32(values))
    if scale is not None:
        rest["scale"] = opset.constant(np.float32(scale))
    x = opset.scaled_dot_product_attention(q, k, v, causal=causal, **rest)
    out = opset.transpose(x, [0, 2, 1, 3]) if swapped else x
    return model(inputs, out, *([opset.relu(x)] if two_users else []))


@needs_extension
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"swapped": False}, {"causal": True}, {"scale": 0.3}, {"mask": 0.0},
                                     {"head_dim": 160, "keys": 16}, {"two_users": True}], ids=str)
def test_ours_replaces_an_attention_that_it_can_compute(dtype: str, options: dict) -> None:
    if dtype not in OPENVINO.dtypes():
        pytest.skip(f"this CPU does not compute in {dtype}")
    changed = graph(**options)
    expected = outputs(changed)
    assert replace_attention(ov, changed, extension.maker("Attention")) == 1
    assert "Attention" in kinds(changed) and "ScaledDotProductAttention" not in kinds(changed)
    assert options.get("two_users") or "Transpose" not in kinds(changed)
    for got, wanted in zip(outputs(changed, PRECISION[dtype]), expected, strict=True):
        assert relative_rms(got, wanted) < ENGINE_REL_RMS[dtype]


@needs_extension
@pytest.mark.parametrize("options", [{"head_dim": 12}, {"dense_mask": True}, {"mask": 1.0}], ids=str)
def test_an_attention_that_ours_cannot_compute_stays(options: dict) -> None:
    same = graph(**options)
    assert replace_attention(ov, same, extension.maker("Attention")) == 0
    assert kinds(same).count("ScaledDotProductAttention") == 1
