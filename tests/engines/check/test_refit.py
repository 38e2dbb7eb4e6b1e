"""The check of new weights: engines that take them pass; one that loses a bias, or puts it elsewhere, does not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper as h
from onnx import numpy_helper

import engines
from engines.bundle import Bundle, Check, Component
from engines.check import refit as verify_refit
from engines.onnx.low_rank import Weight
from engines.openvino.engine import OpenVinoEngine
from engines.spec import EngineConfig, EngineError, TensorSpec
from engines.store import store
from tests.tools.small import small_bundle

IN, MIDDLE, OUT = 6, 8, 4
NAMES = {"gemm.weight", "gemm.bias", "linear.weight", "linear.bias", "matrix.weight", "matrix.bias"}


@pytest.fixture
def products(tmp_path: Path) -> tuple[Path, Component]:
    """A Gemm, a transposed weight and a plain one, each with a bias; the last Add is of no bias."""
    rng = np.random.default_rng(0)
    shapes = {"gemm.weight": (MIDDLE, IN), "gemm.bias": (MIDDLE,), "linear.weight": (MIDDLE, MIDDLE),
              "linear.bias": (MIDDLE,), "matrix.weight": (MIDDLE, OUT), "matrix.bias": (OUT,)}
    weights = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in shapes.items()]
    nodes = [h.make_node("Gemm", ["x", "gemm.weight", "gemm.bias"], ["a"], transB=1), h.make_node("Relu", ["a"], ["b"]),
             h.make_node("Transpose", ["linear.weight"], ["w"], perm=[1, 0]), h.make_node("MatMul", ["b", "w"], ["c"]),
             h.make_node("Add", ["linear.bias", "c"], ["d"]), h.make_node("MatMul", ["d", "matrix.weight"], ["e"]),
             h.make_node("Add", ["e", "matrix.bias"], ["f"]), h.make_node("Add", ["f", "f"], ["y"])]
    values = [h.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", d]) for n, d in (("x", IN), ("y", OUT))]
    model = h.make_model(h.make_graph(nodes, "products", values[:1], values[1:], weights), ir_version=11,
                         opset_imports=[h.make_opsetid("", 23)])
    onnx.save(model, tmp_path / "products.onnx")
    component = Component("products.onnx", {}, "fp32", (TensorSpec("x", "float32", ("batch", IN)),),
                          (TensorSpec("y", "float32", ("batch", OUT)),), {}, Check("itself", 0, 0.0, 0.0))
    return tmp_path / "products.onnx", component


def test_every_weight_and_bias_is_found_and_changed(products: tuple[Path, Component]) -> None:
    file = products[0]
    weights = verify_refit.perturbed(file, 1)
    assert set(weights) == NAMES and verify_refit.biases(file) == {n for n in NAMES if n.endswith("bias")}
    old = {w.name: numpy_helper.to_array(w) for w in onnx.load(file).graph.initializer}
    rms = {n: float(np.sqrt(np.mean((weights[n] - old[n]) ** 2))) for n in NAMES}
    for name in NAMES:
        assert weights[name].dtype == np.float32 and weights[name].shape == old[name].shape
        assert 0.02 < rms[name] < 0.1 if name.endswith("weight") else 0.3 < rms[name] < 4
    assert set(verify_refit.perturbed(file, 1, ["linear.bias"])) == {"linear.bias"}


def opened(backend: str, products: tuple[Path, Component], kind: type | None = None):
    file, component = products
    config = EngineConfig(backend, {"batch": 3})
    if kind is not None:
        return kind(file, component, config), config
    module = engines.backend(backend)
    module.build(file, component, config, file.parent)
    return module.load(file, component, config, file.parent), config


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_engines_that_take_new_weights_pass(products: tuple[Path, Component], backend: str) -> None:
    file, component = products
    engine, config = opened(backend, products)
    weights = verify_refit.perturbed(file, 1)
    figures = verify_refit.compare(engine, file, component, config, weights)
    assert 0 <= figures.rel_rms < 1e-5 and figures.reference == "onnxruntime fp32 on cpu with the same weights"
    assert verify_refit.ignored(engine, file, weights) == []
    weights = {**weights, "matrix.bias": np.zeros(OUT, np.float32)}
    assert verify_refit.ignored(engine, file, weights) == ["matrix.bias"]  # turned round it is what it was


@pytest.mark.parametrize("lost", sorted(n for n in NAMES if n.endswith("bias")))
def test_an_engine_that_loses_a_bias_does_not_pass(products: tuple[Path, Component], lost: str) -> None:
    class Forgetful(OpenVinoEngine):
        def refit(self, weights: Mapping[str, Weight]) -> None:
            super().refit({name: value for name, value in weights.items() if name != lost})

    file, component = products
    engine, config = opened("openvino", products, Forgetful)
    weights = verify_refit.perturbed(file, 1)
    with pytest.raises(EngineError, match=r"with 6 new weights: output y differs from onnxruntime fp32"):
        verify_refit.compare(engine, file, component, config, weights)
    assert verify_refit.ignored(engine, file, weights) == [lost]


def test_the_engine_in_a_directory(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "small")
    config = bundle.config("unet", backend="openvino", size=(64, 64), batch=2)
    path = store.build(bundle, "unet", config)
    assert verify_refit.check(bundle, "unet", config, path).rel_rms < 1e-4
    old = {"conv_in.bias": numpy_helper.to_array(next(
        w for w in onnx.load(bundle.path / "unet.onnx").graph.initializer if w.name == "conv_in.bias"))}
    assert verify_refit.check(bundle, "unet", config, path, {"conv_in.bias": 2 * old["conv_in.bias"]}).rel_rms < 1e-4
    with pytest.raises(EngineError, match=r"got no weight to change"):
        verify_refit.check(bundle, "unet", config, path, {})


def test_a_backend_that_refits_is_checked_when_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(small_bundle(tmp_path / "small").path)
    module = engines.backend("openvino")

    class Forgetful(OpenVinoEngine):
        def refit(self, weights: Mapping[str, Weight]) -> None:
            super().refit({name: value for name, value in weights.items() if name != "conv_in.bias"})

    monkeypatch.setattr(module, "refits", lambda config: True, raising=False)
    config = bundle.config("unet", backend="openvino", size=(64, 64), batch=2)
    store.build(bundle, "unet", config)
    monkeypatch.setattr(module, "OpenVinoEngine", Forgetful)
    with pytest.raises(EngineError, match=r"engine with \d new weights: output noise_pred differs"):
        store.build(bundle, "unet", config, rebuild=True)
