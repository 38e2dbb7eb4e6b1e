"""Our kernels in OpenVINO graphs: put where they compute the same, left out where not, and chosen by option."""

from typing import Any

import numpy as np
import pytest

import engines
from engines.bundle import Bundle
from engines.openvino_passes import own_attention, own_group_norm
from engines.spec import EngineError
from kernels import native
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
    core.add_extension(str(native.openvino_extension()))
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
    assert own_attention(ov, model, module._own_op("Attention"), bf16=dtype == "bf16") == 1
    kinds = [op.get_type_name() for op in model.get_ordered_ops()]
    assert "Attention" in kinds and "ScaledDotProductAttention" not in kinds
    assert options.get("two_users") or "Transpose" not in kinds
    for got, wanted in zip(outputs(model, module.PRECISION[dtype]), expected, strict=True):
        assert np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)) < ENGINE_REL_RMS[dtype]


@needs_extension
@pytest.mark.parametrize("options", [{"head_dim": 12}, {"dense_mask": True}, {"mask": 1.0}], ids=str)
def test_an_attention_that_ours_cannot_compute_stays(options: dict) -> None:
    model = graph(**options)
    assert own_attention(ov, model, module._own_op("Attention"), bf16=False) == 0
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
    assert own_group_norm(ov, model, module._own_op("GroupNormSilu"), bf16=dtype == "bf16") == 1
    kinds = [op.get_type_name() for op in model.get_ordered_ops()]
    fused = options in ({}, {"silu": "swish"})
    assert "GroupNormSilu" in kinds and "GroupNormalization" not in kinds
    assert fused == (not {"Sigmoid", "Swish"} & {*kinds} and options.get("silu") != "none")
    for got, wanted in zip(outputs(model, module.PRECISION[dtype]), expected, strict=True):
        assert np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)) < ENGINE_REL_RMS[dtype]


@needs_extension
@pytest.mark.parametrize("kind", list(module.KERNELS))
def test_the_option_chooses_whose_kernel_an_engine_has(bundles, kind: str) -> None:
    bundle = Bundle.open(bundles["shapes"])
    results = {}
    for name in ("latentrt", "openvino"):
        options = dict.fromkeys(module.KERNELS, "openvino") | {kind: name}
        config = bundle.config("unet", backend="openvino", height=64, width=64, batch=2, options=options)
        engine = engines.load(bundle, "unet", config)
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
        engines.load(bundle, "unet", bundle.config("unet", backend="openvino", height=64, width=64, batch=2,
                                                   options=options))

    with pytest.raises(EngineError, match="option attention: got 'flash', expected one of latentrt, openvino"):
        load(attention="flash")
    monkeypatch.setattr(module, "_extension_missing", lambda: "install a compiler")
    with pytest.raises(EngineError, match="option attention: install a compiler"):
        load(attention="latentrt")
    load()
