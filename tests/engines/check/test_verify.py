"""Comparing engines: error statistics, and what `verify` shows of an engine that fails."""

import json
import math
import shutil

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import engines
from engines import __main__ as cli
from engines import store
from engines.bundle import Bundle
from engines.check import verify
from engines.check.verify import difference
from engines.spec import EngineError
from tests.tools.small import small_bundle

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return small_bundle(tmp_path_factory.mktemp("originals") / "small").path


@pytest.fixture
def bundle(original, tmp_path):
    return Bundle.open(shutil.copytree(original, tmp_path / "small"))


def config(bundle, backend="openvino", batch=2, **rest):
    return bundle.config("unet", backend=backend, size=(64, 64), batch=batch, **rest)


def run(capsys, *words):
    status = cli.main([str(w) for w in words])
    return status, capsys.readouterr().out


def test_statistics_are_what_they_say():
    truth = np.array([3.0, -4.0, 0.0, 0.0], np.float32)
    got = truth + np.array([0.1, -0.1, 0.1, 0.3], np.float32)
    found = difference(got, truth)
    rms = math.sqrt(0.12 / 4)
    assert found.max_abs == pytest.approx(0.3) and found.mean_abs == pytest.approx(0.15)
    assert found.rel_rms == pytest.approx(rms / 2.5) and found.psnr == pytest.approx(20 * math.log10(4 / rms))
    assert found.cosine == pytest.approx((3.1 * 3 + 4.1 * 4) / (5 * math.sqrt(3.1**2 + 4.1**2 + 0.1**2 + 0.3**2)))
    assert difference(got, truth, peak=1.0).psnr == pytest.approx(-20 * math.log10(rms))
    assert difference(-truth, truth).cosine == pytest.approx(-1)
    assert difference(truth * 1.01, truth).rel_rms == pytest.approx(0.01, rel=1e-3)


def test_equal_arrays_have_no_psnr_in_json():
    found = difference(np.ones(3), np.ones(3))
    assert (found.psnr, found.max_abs, found.rel_rms) == (math.inf, 0, 0) and found.cosine == pytest.approx(1)
    assert found.to_json()["psnr"] is None and json.loads(json.dumps(found.to_json(), allow_nan=False))


def test_nan_and_inf_are_counted_on_both_sides():
    got, truth = np.array([np.nan, np.nan, np.inf, 1, 2.0]), np.array([1, 2, 3, -np.inf, 2.5])
    found = difference(got, truth)
    assert (found.nan, found.inf, found.reference_nan, found.reference_inf) == (2, 1, 0, 1) and not found.finite
    assert found.max_abs == 0.5  # of the one that is finite in both
    assert json.dumps(difference(got[:1], truth[:1]).to_json(), allow_nan=False)
    with pytest.raises(EngineError, match="has NaN or Inf, the fp32 reference has none; use --dtype fp32"):
        verify.judge("x", difference(got[:3], truth[:3]), "fp32", "engine")
    with pytest.raises(EngineError, match="onnxruntime fp32 on cpu has NaN or Inf in output x: the exported graph is"):
        verify.judge("x", difference(got[3:], truth[3:]), "fp32", "engine")


def test_verify_shows_figures_of_an_engine_that_fails(bundle, capsys, monkeypatch):
    path = store.build(bundle, "unet", config(bundle))
    module = engines.backend("openvino")
    old = next(numpy_helper.to_array(w) for w in onnx.load(bundle.path / "unet.onnx").graph.initializer
               if w.name == "conv_out.weight")

    def load(*given, real=module.load):
        engine = real(*given)
        engine.refit({"conv_out.weight": old * np.float32(1.01)})
        return engine

    monkeypatch.setattr(module, "load", load)
    status, out = run(capsys, "verify", bundle.path, "--json")
    found = next(check for check in json.loads(out)["checks"] if check["name"] == path.name)
    assert status == 1 and "differs from onnxruntime fp32 on cpu by 1.00e-02" in found["error"]
    figures = found["outputs"]["noise_pred"]
    assert figures["rel_rms"] == pytest.approx(0.01, rel=1e-3) and figures["cosine"] == pytest.approx(1)
    assert 40 < figures["psnr"] < 60 and 0 < figures["mean_abs"] < figures["max_abs"]
