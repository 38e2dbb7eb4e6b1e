"""Comparing engines: error statistics, and a whole denoising beside the reference's."""

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
from engines.backend import Engine
from engines.bundle import Bundle
from engines.check import trajectory, verify
from engines.check.verify import difference
from engines.spec import EngineError, TensorSpec
from kernels.host.step import advance, guide, initial_state
from runtime.schedulers import make_table
from tests.tolerances import IMAGE_MAX, PSNR_16BIT_DB, SCHEDULER_REL
from tests.tools.small import small_bundle

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

BF16 = pytest.mark.skipif("bf16" not in engines.backend("openvino").dtypes(),
                          reason="this CPU does not compute in bf16")
SCHEDULE = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
            "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = small_bundle(tmp_path_factory.mktemp("originals") / "small").path
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "scheduler": SCHEDULE}))
    return path


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


def test_tolerances_are_those_of_the_tests():
    assert (trajectory.PICTURE_MAX, trajectory.LEAST_PSNR) == (IMAGE_MAX, PSNR_16BIT_DB)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
def test_the_denoising_is_the_runtime_s_ddim(bundle, prediction_type, betas):
    config = {**SCHEDULE, "beta_schedule": betas, "prediction_type": prediction_type}
    manifest = bundle.manifest.__class__(**{**vars(bundle.manifest), "scheduler": config,
                                            "prediction_type": prediction_type})
    start = np.random.default_rng(1).standard_normal((1, 4, 8, 8)).astype(np.float32)

    def predict(x, step):  # nothing that lets the two drift apart by feeding rounding back
        return np.random.default_rng(step).standard_normal((2, 4, 8, 8)).astype(np.float32)

    table = make_table(config, 20)
    state = initial_state(table, start[0])
    plan = trajectory.schedule(manifest, 20)
    assert list(plan.timesteps) == list(table.timesteps)
    for i, x in enumerate(trajectory.denoise(predict, start, plan, 7.5, prediction_type)):
        advance(state, guide(*predict(state[:1], i), 7.5), None, table, i)
        assert np.abs(x[0] - state[0]).max() <= SCHEDULER_REL * np.abs(state[0]).max()


def test_schedules_that_have_no_betas_are_refused(bundle):
    manifest = bundle.manifest.__class__(**{**vars(bundle.manifest), "scheduler": {"beta_schedule": "cosine"}})
    with pytest.raises(EngineError, match="got beta_schedule 'cosine', expected linear or scaled_linear"):
        trajectory.schedule(manifest, 20)
    with pytest.raises(EngineError, match="got 1000 steps, expected fewer than the 1000"):
        trajectory.schedule(bundle.manifest, 1000)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_an_engine_of_any_batch_predicts_the_same(bundle, batch):
    specs = {s.name: s.resolve(config(bundle).dims) for s in bundle.component("unet").inputs}
    text, time = verify.inputs([specs["encoder_hidden_states"]], 0), {"timestep": np.array([900, 501], np.float32)}
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    two, other = (trajectory.predictor(store.load(bundle, "unet", config(bundle, batch=n)), text, time)(latents, 1)
                  for n in (2, batch))
    assert two.shape == other.shape == (2, 4, 8, 8) and not np.allclose(two[0], two[1])
    np.testing.assert_allclose(other, two, rtol=1e-4, atol=1e-5)


class Sum(Engine):
    """An engine of five sample channels whose prediction is the sum over each of four and the fifth."""

    def __init__(self):
        self.inputs = {"sample": TensorSpec("sample", "float32", (1, 5, 2, 2))}
        self.outputs = {"noise_pred": TensorSpec("noise_pred", "float32", (1, 4, 2, 2))}

    def bind(self, buffers):
        self.buffers = buffers

    def enqueue(self, stream=None):
        self.buffers["noise_pred"][:] = self.buffers["sample"][:, :4] + self.buffers["sample"][:, 4:]


def test_channels_after_the_latent_ones_are_zero():
    latents = np.arange(16, dtype=np.float32).reshape(1, 4, 2, 2)
    np.testing.assert_array_equal(trajectory.predictor(Sum(), {}, {})(latents, 0), np.concatenate([latents, latents]))


def broken(bundle, change):
    """An `openvino.load` of engines whose noise prediction `change(noise_pred, timestep)` alters in place."""
    real = engines.backend("openvino").load

    def load(*arguments):
        engine = real(*arguments)
        bind, enqueue, buffers = engine.bind, engine.enqueue, {}

        def bind_and_keep(given):
            buffers.update(given)
            bind(given)

        def enqueue_and_change(stream=None):
            enqueue(stream)
            change(buffers["noise_pred"], buffers["timestep"][0])

        engine.bind, engine.enqueue = bind_and_keep, enqueue_and_change
        return engine
    return load


@BF16
def test_whole_denoisings_are_compared(bundle, capsys):
    for dtype, batch in (("fp32", 1), ("bf16", 2)):
        store.build(bundle, "unet", config(bundle, dtype=dtype, batch=batch))
    store.build(bundle, "unet", config(bundle, "onnxruntime"))
    status, out = run(capsys, "verify", bundle.path, "--trajectory", "--steps", 8, "--json")
    found = json.loads(out)
    assert status == 0 and len(found["checks"]) == 4
    by_dtype = {store.Record.read(bundle.path / "engines" / t["name"], "").config.dtype: t
                for t in found["trajectories"]}
    assert set(by_dtype) == {"fp32", "bf16"}  # the reference itself is not compared
    fp32, bf16 = by_dtype["fp32"], by_dtype["bf16"]
    assert [len(t["steps"]) for t in (fp32, bf16)] == [8, 8]
    assert fp32["picture"]["max_abs"] <= IMAGE_MAX and bf16["picture"]["psnr"] >= PSNR_16BIT_DB
    assert fp32["steps"][-1]["rel_rms"] < bf16["steps"][-1]["rel_rms"] < 0.1
    status, out = run(capsys, "verify", bundle.path, "--trajectory", "--steps", 3)
    assert status == 0 and "3 steps of DDIM, guidance 7.5" in out and out.count(" dB, ") == 6


def test_a_denoising_that_goes_wrong_is_status_1(bundle, capsys, monkeypatch):
    store.build(bundle, "unet", config(bundle))

    def grow(noise_pred, timestep):  # right at the timesteps that the check of one call draws, wrong at low ones
        noise_pred *= 1 if timestep > 300 else 1.01

    monkeypatch.setattr(engines.backend("openvino"), "load", broken(bundle, grow))
    status, out = run(capsys, "verify", bundle.path, "--trajectory", "--steps", 10, "--json")
    found = json.loads(out)
    assert status == 1 and not any(check["error"] for check in found["checks"])
    assert "of full scale, expected at most 1e-03" in found["trajectories"][0]["error"]
    steps = found["trajectories"][0]["steps"]
    assert steps[6]["rel_rms"] < 1e-4 < steps[9]["rel_rms"]  # timesteps 901, 801 … 301, 201, 101, 1


def test_the_step_of_the_first_nan_is_told(bundle, capsys, monkeypatch):
    store.build(bundle, "unet", config(bundle))

    def spoil(noise_pred, timestep):
        noise_pred[0, 0, 0, 0] = np.nan if timestep < 300 else noise_pred[0, 0, 0, 0]

    monkeypatch.setattr(engines.backend("openvino"), "load", broken(bundle, spoil))
    status, out = run(capsys, "verify", bundle.path, "--trajectory", "--steps", 10, "--json")
    found = json.loads(out)["trajectories"][0]
    assert status == 1 and found["not_finite_from_step"] == 8 and found["error"] == "NaN or Inf from step 8 on"
    assert found["steps"][7]["nan"] == 1 and found["picture"]["nan"] > 0


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
