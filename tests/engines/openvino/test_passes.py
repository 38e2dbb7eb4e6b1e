"""Our kernels in OpenVINO graphs: put where they compute the same, left out where not, and chosen by option."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import engines
from engines import store
from engines.bundle import Bundle
from engines.openvino.passes import halve_gates, narrow, own_attention, own_group_norm
from engines.spec import EngineError
from kernels.cpu import library
from tests.tolerances import ENGINE_REL_RMS

ov = pytest.importorskip("openvino")
module = engines.backend("openvino")
needs_extension = pytest.mark.skipif(module._extension_missing() is not None, reason=str(module._extension_missing()))


def graph(head_dim: int = 40, *, keys: int = 24, swapped: bool = True, causal: bool = False, scale: float | None = None,
          mask: float | None = None, dense_mask: bool = False, two_users: bool = False) -> Any:
    """softmax(q kᵀ) v of [2, tokens, 3, head_dim] if `swapped`, else of [2, 3, tokens, head_dim]."""
    opset = ov.opset13
    shape = (lambda n: [2, n, 3, head_dim]) if swapped else (lambda n: [2, 3, n, head_dim])
    inputs = [opset.parameter(shape(n), name=name) for name, n in (("q", 16), ("k", keys), ("v", keys))]
    for parameter in inputs:
        parameter.output(0).get_tensor().set_names({parameter.get_friendly_name()})
    q, k, v = (opset.transpose(x, [0, 2, 1, 3]) if swapped else x for x in inputs)
    rest = {}
    if scale is not None or mask is not None or dense_mask:
        values = np.random.default_rng(1).standard_normal((16, keys)) if dense_mask else mask or 0.0
        rest["attention_mask"] = opset.constant(np.float32(values))
    if scale is not None:
        rest["scale"] = opset.constant(np.float32(scale))
    x = opset.scaled_dot_product_attention(q, k, v, causal=causal, **rest)
    out = opset.transpose(x, [0, 2, 1, 3]) if swapped else x
    results = [opset.result(out), *([opset.result(opset.relu(x))] if two_users else [])]
    return ov.Model(results, inputs, "graph")


def outputs(model: Any, precision: str) -> list[np.ndarray]:
    core = ov.Core()
    core.add_extension(str(library.openvino_extension()))
    rng = np.random.default_rng(0)
    feed = {p.get_friendly_name(): rng.standard_normal(list(p.get_output_shape(0))).astype(np.float32)
            for p in model.get_parameters()}
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    return [np.array(x) for x in compiled(feed).values()]


@needs_extension
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"swapped": False}, {"causal": True}, {"scale": 0.3}, {"mask": 0.0},
                                     {"head_dim": 160, "keys": 16}, {"two_users": True}], ids=str)
def test_ours_replaces_an_attention_that_it_can_compute(dtype: str, options: dict) -> None:
    if dtype not in module.dtypes():
        pytest.skip(f"this CPU does not compute in {dtype}")
    model = graph(**options)
    expected = outputs(model, "f32")
    assert own_attention(ov, model, module._own_op("Attention")) == 1
    kinds = [op.get_type_name() for op in model.get_ordered_ops()]
    assert "Attention" in kinds and "ScaledDotProductAttention" not in kinds
    assert options.get("two_users") or "Transpose" not in kinds
    for got, wanted in zip(outputs(model, module.PRECISION[dtype]), expected, strict=True):
        assert np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)) < ENGINE_REL_RMS[dtype]


@needs_extension
@pytest.mark.parametrize("options", [{"head_dim": 12}, {"dense_mask": True}, {"mask": 1.0}], ids=str)
def test_an_attention_that_ours_cannot_compute_stays(options: dict) -> None:
    model = graph(**options)
    assert own_attention(ov, model, module._own_op("Attention")) == 0
    assert [op.get_type_name() for op in model.get_ordered_ops()].count("ScaledDotProductAttention") == 1


def norm_graph(shape: tuple[int, ...] = (2, 24, 6, 5), *, silu: str = "sigmoid", shared: bool = False) -> Any:
    """Group norm of [batch, channels, …] in 4 groups, then x · sigmoid(x) as two nodes or one, or something else."""
    opset, rng = ov.opset13, np.random.default_rng(1)
    x = opset.parameter(list(shape), name="x")
    x.output(0).get_tensor().set_names({"x"})
    weight, bias = (opset.constant(rng.standard_normal(shape[1]).astype(np.float32)) for _ in range(2))
    y = opset.group_normalization(x, weight, bias, 4, 1e-5)
    out = {"sigmoid": lambda: opset.multiply(opset.sigmoid(y), y), "swish": lambda: opset.swish(y), "none": lambda: y,
           "other": lambda: opset.add(opset.sigmoid(y), opset.multiply(y, np.float32(0.5)))}[silu]()
    return ov.Model([opset.result(out), *([opset.result(opset.relu(y))] if shared else [])], [x], "graph")


@needs_extension
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(2, 24, 6, 5), (1, 16, 7), (2, 8, 3, 4, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"silu": "swish"}, {"silu": "none"}, {"silu": "other"}, {"shared": True}],
                         ids=str)
def test_ours_replaces_a_group_norm(dtype: str, shape: tuple[int, ...], options: dict) -> None:
    if dtype not in module.dtypes():
        pytest.skip(f"this CPU does not compute in {dtype}")
    model = norm_graph(shape, **options)
    expected = outputs(model, "f32")
    assert own_group_norm(ov, model, module._own_op("GroupNormSilu")) == 1
    kinds = [op.get_type_name() for op in model.get_ordered_ops()]
    fused = options in ({}, {"silu": "swish"})
    assert "GroupNormSilu" in kinds and "GroupNormalization" not in kinds
    assert fused == (not {"Sigmoid", "Swish"} & {*kinds} and options.get("silu") != "none")
    for got, wanted in zip(outputs(model, module.PRECISION[dtype]), expected, strict=True):
        assert np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)) < ENGINE_REL_RMS[dtype]


def gate_graph(axis: int = 2, *, bias: bool = True, shared: bool = False) -> Any:
    """a · gelu(b) for the halves a and b of x · weight + bias, [2, 5, 8] each."""
    opset, rng = ov.opset13, np.random.default_rng(1)
    x = opset.parameter([2, 6, 12], name="x")
    x.output(0).get_tensor().set_names({"x"})
    weight, shift = (opset.constant(rng.standard_normal(shape).astype(np.float32)) for shape in ((16, 12), (16,)))
    y = opset.matmul(x, weight, False, True)
    y = opset.add(y, shift) if bias else y
    halves = opset.split(y, opset.constant(np.int64(axis)), 2)
    out = opset.multiply(halves.output(0), opset.gelu(halves.output(1), "erf"))
    return ov.Model([opset.result(out), *([opset.result(opset.relu(y))] if shared else [])], [x], "graph")


@pytest.mark.parametrize("axis", [2, -1])
def test_a_gate_has_a_product_of_its_own(axis: int) -> None:
    model = gate_graph(axis)
    expected = outputs(model, "f32")
    assert halve_gates(ov, model) == 1
    halves = [op for op in model.get_ordered_ops() if op.get_type_name() == "MatMul"]
    assert [list(op.get_output_shape(0)) for op in halves] == [[2, 6, 8]] * 2
    np.testing.assert_allclose(outputs(model, "f32")[0], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"axis": 1}, {"bias": False}, {"shared": True}], ids=str)
def test_a_split_of_something_else_stays(options: dict) -> None:
    model = gate_graph(**options)
    assert halve_gates(ov, model) == 0
    assert [op.get_type_name() for op in model.get_ordered_ops()].count("MatMul") == 1


def constant(values: np.ndarray, kind: str) -> Any:
    if kind != "bf16":
        return ov.opset13.constant(values.astype({"f32": np.float32, "f16": np.float16}[kind]))
    tensor = ov.Tensor(ov.Type.bf16, ov.Shape(list(values.shape)))
    tensor.data.view(np.uint16)[...] = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    return ov.op.Constant(tensor)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_weights_are_rounded_to_the_nearest(kind: str) -> None:
    """As ml_dtypes rounds, ties to even; the largest float32 stays finite, and what was not finite stays that."""
    random = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    values = np.concatenate([random, [0.0, -0.0, 1.00390625, 1.01171875, np.inf, -np.inf, np.nan]]).astype(np.float32)
    x = ov.opset13.parameter([len(values)], name="x")
    weights = constant(values, kind)
    wide = weights if kind == "f32" else ov.opset13.convert(weights, "f32")
    model = ov.Model([ov.opset13.result(ov.opset13.add(x, wide))], [x], "graph")
    narrow(ov, model)
    found = next(op for op in model.get_ordered_ops() if op.get_type_name() == "Constant")
    stored = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[kind]
    expected = values.astype(stored).astype(ml_dtypes.bfloat16)
    got = found.get_data().view(np.uint16).view(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(got.astype(np.float32), expected.astype(np.float32))


def test_the_largest_weight_stays_finite() -> None:
    x = ov.opset13.parameter([2], name="x")
    largest = np.finfo(np.float32).max
    model = ov.Model([ov.opset13.result(ov.opset13.add(x, constant(np.array([largest, -largest]), "f32")))], [x], "g")
    narrow(ov, model)
    found = next(op for op in model.get_ordered_ops() if op.get_type_name() == "Constant")
    bits = found.get_data().view(np.uint16).view(ml_dtypes.bfloat16).astype(np.float64)
    assert np.isfinite(bits).all() and bits[0] == -bits[1] > 3.3e38


@needs_extension
def test_a_narrow_graph_is_float32_outside() -> None:
    model = norm_graph()
    own_group_norm(ov, model, module._own_op("GroupNormSilu"))
    narrow(ov, model)
    types = {op.get_type_name(): op.get_output_element_type(0).to_string() for op in model.get_ordered_ops()}
    assert types["Parameter"] == types["Result"] == "f32" and types["GroupNormSilu"] == "bf16"
    norm = next(op for op in model.get_ordered_ops() if op.get_type_name() == "GroupNormSilu")
    assert [value.get_element_type().to_string() for value in norm.input_values()] == ["bf16", "f32", "f32"]
    assert model.input(0).get_names() == {"x"}


@needs_extension
@pytest.mark.parametrize("kind", list(module.KERNELS))
def test_the_option_chooses_whose_kernel_an_engine_has(bundles, kind: str) -> None:
    bundle = Bundle.open(bundles["shapes"])
    results = {}
    for name in ("latentrt", "openvino"):
        options = dict.fromkeys(module.KERNELS, "openvino") | {kind: name}
        config = bundle.config("unet", backend="openvino", size=(64, 64), batch=2, options=options)
        engine = store.load(bundle, "unet", config)
        rng = np.random.default_rng(0)
        buffers = {spec.name: spec.empty() for spec in (*engine.inputs.values(), *engine.outputs.values())}
        for spec in engine.inputs.values():
            buffers[spec.name][:] = rng.standard_normal(buffers[spec.name].shape)
        engine.bind(buffers)
        engine.enqueue()
        results[name] = buffers["noise_pred"].copy(), set(module.versions(config))
    ours, theirs = results["latentrt"][0], results["openvino"][0]
    assert not np.array_equal(ours, theirs) and np.abs(ours - theirs).max() < 1e-4
    assert results["latentrt"][1] - results["openvino"][1] == {"kernels"}


def test_a_wrong_choice_is_refused(bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(bundles["shapes"])

    def load(**options: str) -> None:
        store.load(bundle, "unet", bundle.config("unet", backend="openvino", size=(64, 64), batch=2,
                                                   options=options))

    with pytest.raises(EngineError, match="option attention: got 'flash', expected one of latentrt, openvino"):
        load(attention="flash")
    monkeypatch.setattr(module, "_extension_missing", lambda: "install a compiler")
    with pytest.raises(EngineError, match="option attention: install a compiler"):
        load(attention="latentrt")
    load()
