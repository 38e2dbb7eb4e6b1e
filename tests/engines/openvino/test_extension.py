"""OpenVINO graphs that call the C++ kernels, through ONNX nodes of domain `latentrt`."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from kernels.cpu import library

openvino = pytest.importorskip("openvino")
try:
    EXTENSION = library.openvino_extension()
except library.CpuKernelError as error:
    pytest.skip(str(error), allow_module_level=True)

TOLERANCE = {"f32": 2e-6, "bf16": 2e-2}
"""Largest difference from float64, of the largest value. In bf16 the plugin may round the inputs too."""


@pytest.fixture(scope="module")
def core():
    core = openvino.Core()
    core.add_extension(str(EXTENSION))
    return core


def _model(op: str, shapes: dict[str, list[int]], **attributes: object) -> bytes:
    """One node between an Add before and a Mul after it, so that it sits inside a graph."""
    first, *rest = shapes
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, shapes[first])
    one, two = (helper.make_tensor(n, TensorProto.FLOAT, [1], [value]) for n, value in (("one", 1.0), ("two", 2.0)))
    nodes = [helper.make_node("Add", [first, "one"], ["more"]),
             helper.make_node(op, ["more", *rest], ["result"], domain="latentrt", **attributes),
             helper.make_node("Mul", ["result", "two"], ["out"])]
    graph = helper.make_graph(nodes, "graph", inputs, [output], [one, two])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("latentrt", 1)]
    return onnx.ModelProto.SerializeToString(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def _run(core, model: bytes, inputs: dict[str, np.ndarray], precision: str, threads: int = 2) -> np.ndarray:
    compiled = core.compile_model(core.read_model(model), "CPU", {"INFERENCE_PRECISION_HINT": precision,
                                                                  "INFERENCE_NUM_THREADS": threads})
    return compiled(inputs)["out"]


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("heads_first", [1, 0], ids=["BHND", "BNHD"])
@pytest.mark.parametrize(("queries", "keys", "causal"), [(128, 77, 0), (77, 77, 1), (33, 1, 0)])
def test_attention(core, precision, heads_first, queries, keys, causal):
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bf16")
    rng = np.random.default_rng(0)
    shapes = {"q": [2, 8, queries, 40], "k": [2, 8, keys, 40], "v": [2, 8, keys, 40]}
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in shapes.values())
    scores = (q + 1.0) @ k.swapaxes(-1, -2) * 40 ** -0.5
    if causal:
        scores[..., ~np.tril(np.ones((queries, keys), bool))] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = 2 * (weights / weights.sum(-1, keepdims=True)) @ v
    inputs = {"q": q, "k": k, "v": v}
    if not heads_first:
        inputs = {name: np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for name, x in inputs.items()}
    shapes = {name: list(x.shape) for name, x in inputs.items()}
    model = _model("Attention", shapes, heads_first=heads_first, causal=causal)
    out = _run(core, model, inputs, precision)
    out = out if heads_first else out.transpose(0, 2, 1, 3)
    assert np.abs(out - expected).max() <= TOLERANCE[precision] * np.abs(expected).max()


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("channels_last", [0, 1], ids=["nchw", "nhwc"])
def test_group_norm_silu(core, precision, channels_last):
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bf16")
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 64, 9, 7), (64,), (64,)))
    grouped = (x.astype(np.float64) + 1).reshape(2, 32, -1)
    normal = (grouped - grouped.mean(-1, keepdims=True)) / np.sqrt(grouped.var(-1, keepdims=True) + 1e-6)
    y = normal.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]
    expected = 2 * y / (1 + np.exp(-y))
    stored = np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if channels_last else x
    shapes = {"x": list(stored.shape), "weight": [64], "bias": [64]}
    model = _model("GroupNormSilu", shapes, groups=32, eps=1e-6, silu=1, channels_last=channels_last)
    out = _run(core, model, {"x": stored, "weight": weight, "bias": bias}, precision)
    out = out.transpose(0, 3, 1, 2) if channels_last else out
    assert np.abs(out - expected).max() <= TOLERANCE[precision] * np.abs(expected).max()


def test_a_graph_that_cannot_be_run_is_refused(core):
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal((1, 1, 4, 12)).astype(np.float32) for name in "qkv"}
    with pytest.raises(RuntimeError, match="multiple of 8"):
        _run(core, _model("Attention", {name: [1, 1, 4, 12] for name in "qkv"}), inputs, "f32")
