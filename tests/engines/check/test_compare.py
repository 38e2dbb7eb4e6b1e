"""Comparing engines with the reference: error statistics, inputs, verdicts."""

import json
import math

import numpy as np
import pytest

from engines.check import compare
from engines.check.compare import difference
from engines.spec import EngineError, TensorSpec


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
        compare.judge("x", difference(got[:3], truth[:3]), "fp32", "engine")
    with pytest.raises(EngineError, match="onnxruntime fp32 on cpu has NaN or Inf in output x: the exported graph is"):
        compare.judge("x", difference(got[3:], truth[3:]), "fp32", "engine")


def test_inputs_are_of_the_span_of_their_specs():
    specs = [TensorSpec("t", "float32", (500,), span=(0, 1000)), TensorSpec("x", "float32", (500,)),
             TensorSpec("ids", "int64", (500,)), TensorSpec("label", "int64", (500,), span=(3, 5))]
    feed = compare.inputs(specs, 1)
    assert 0 <= feed["t"].min() < 100 and 900 < feed["t"].max() < 1000
    assert abs(feed["x"].mean()) < 0.2 and 0.8 < feed["x"].std() < 1.2
    assert feed["ids"].min() >= 0 and 200 < feed["ids"].max() < 256 and set(feed["label"]) == {3, 4}
    again = compare.inputs(specs, 1)
    assert all(np.array_equal(feed[name], again[name]) for name in feed)
