"""`python -m benchmarks trajectory`: a denoising is the runtime's, and an engine whose error grows is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import engines
from benchmarks.__main__ import main
from benchmarks.harness import denoising
from engines import Engine, EngineError, TensorSpec, store
from engines.bundle import Bundle, Guidance
from engines.check import compare
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


def compared(bundle: Bundle, tmp_path: Path, *words: Any) -> tuple[int, dict[str, Any]]:
    """Run the command; return its exit status and what it wrote."""
    file = tmp_path / "figures.json"
    status = main(["trajectory", str(bundle.path), "--json", str(file), *map(str, words)])
    return status, json.loads(file.read_text())


def test_tolerances_are_those_of_the_tests():
    assert (denoising.PICTURE_MAX, denoising.LEAST_PSNR) == (IMAGE_MAX, PSNR_16BIT_DB)


def predict(x: np.ndarray, step: int) -> np.ndarray:
    """Return a prediction that does not depend on `x`, so that rounding is not fed back."""
    return np.random.default_rng(step).standard_normal((2, *x.shape), np.float32)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("scheduler", "cls"), [("ddim", "DDIMScheduler"), ("euler", "EulerDiscreteScheduler")])
def test_a_denoising_is_that_of_diffusers(scheduler, cls, prediction_type):
    config = {**SCHEDULE, "prediction_type": prediction_type}
    table = make_table(config, 20, scheduler=scheduler)
    theirs = getattr(diffusers, cls).from_config(config)
    theirs.set_timesteps(20)
    start = np.random.default_rng(1).standard_normal((4, 8, 8), np.float32)
    x, inputs = torch.from_numpy(start) * theirs.init_noise_sigma, []

    def kept(given: np.ndarray, step: int) -> np.ndarray:
        inputs.append(given.copy())
        return predict(given, step)

    for i, (t, ours) in enumerate(zip(theirs.timesteps, denoising.denoise(kept, start, table, 7.5), strict=True)):
        given = theirs.scale_model_input(x, t).numpy()
        assert np.abs(inputs[i] - given).max() <= SCHEDULER_REL * np.abs(given).max()
        uncond, cond = predict(start, i)
        x = theirs.step(torch.from_numpy(uncond + 7.5 * (cond - uncond)), t, x).prev_sample
        assert np.abs(ours - x.numpy()).max() <= SCHEDULER_REL * x.abs().max().item()


def test_everyone_gets_the_same_noise_from_a_sampler_that_adds_some():
    table, start = make_table(SCHEDULE, 5, scheduler="euler_ancestral"), np.zeros((4, 8, 8), np.float32)
    first, again, other = (list(denoising.denoise(predict, start, table, 7.5, seed)) for seed in (0, 0, 1))
    assert table.draws.any() and np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_an_engine_of_any_batch_predicts_the_same(bundle, batch):
    specs = {s.name: s.resolve(config(bundle).dims) for s in bundle.component("unet").inputs}
    text, time = compare.inputs([specs["encoder_hidden_states"]], 0), {"timestep": np.array([900, 501], np.float32)}
    latents = np.random.default_rng(0).standard_normal((4, 8, 8), np.float32)
    two, other = (denoising.predictor(store.load(bundle, "unet", config(bundle, batch=n)), text, time)(latents, 1)
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
    latents = np.arange(16, dtype=np.float32).reshape(4, 2, 2)
    np.testing.assert_array_equal(denoising.predictor(Sum(), {}, {})(latents, 0), [latents, latents])


def broken(change: Callable[[np.ndarray, float], None]) -> Callable[..., Engine]:
    """Return an `openvino.load` of engines whose noise prediction `change(noise_pred, timestep)` alters in place."""
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
def test_whole_denoisings_are_compared(bundle, tmp_path, capsys):
    for dtype, batch in (("fp32", 1), ("bf16", 2)):
        store.build(bundle, "unet", config(bundle, dtype=dtype, batch=batch))
    store.build(bundle, "unet", config(bundle, "onnxruntime"))
    status, report = compared(bundle, tmp_path, "--steps", 8)
    by_dtype = {store.Record.read(bundle.path / "engines" / t["name"], "").config.dtype: t
                for t in report["trajectories"]}
    assert status == 0 and set(by_dtype) == {"fp32", "bf16"}  # the reference itself is not compared
    assert report["left_out"] == {} and {"cpu", "commit"} <= set(report["machine"])
    fp32, bf16 = by_dtype["fp32"], by_dtype["bf16"]
    assert [len(t["steps"]) for t in (fp32, bf16)] == [8, 8]
    assert fp32["picture"]["max_abs"] <= IMAGE_MAX and bf16["picture"]["psnr"] >= PSNR_16BIT_DB
    assert fp32["steps"][-1]["rel_rms"] < bf16["steps"][-1]["rel_rms"] < 0.1
    capsys.readouterr()
    assert main(["trajectory", str(bundle.path), "--steps", "3", "--scheduler", "euler"]) == 0
    out = capsys.readouterr().out
    assert "3 steps of euler, guidance 7.5" in out and out.count(" dB, ") == 6


def test_a_denoising_that_goes_wrong_is_status_1(bundle, tmp_path, monkeypatch):
    store.build(bundle, "unet", config(bundle))

    def grow(noise_pred, timestep):  # right at the timesteps that the check of one call draws, wrong at low ones
        noise_pred *= 1 if timestep > 300 else 1.01

    monkeypatch.setattr(engines.backend("openvino"), "load", broken(grow))
    status, report = compared(bundle, tmp_path, "--steps", 10)
    trajectory, = report["trajectories"]
    assert status == 1 and "of full scale, expected at most 1e-03" in trajectory["error"]
    steps = trajectory["steps"]
    assert steps[6]["rel_rms"] < 1e-4 < steps[9]["rel_rms"]  # timesteps 901, 801 … 301, 201, 101, 1


def test_the_step_of_the_first_nan_is_told(bundle, tmp_path, monkeypatch):
    store.build(bundle, "unet", config(bundle))

    def spoil(noise_pred, timestep):
        noise_pred[0, 0, 0, 0] = np.nan if timestep < 300 else noise_pred[0, 0, 0, 0]

    monkeypatch.setattr(engines.backend("openvino"), "load", broken(spoil))
    status, report = compared(bundle, tmp_path, "--steps", 10)
    trajectory, = report["trajectories"]
    assert status == 1 and trajectory["error"] == "NaN or Inf from step 8 on"
    assert trajectory["not_finite_from_step"] == 8
    assert trajectory["steps"][7]["nan"] == 1 and trajectory["picture"]["nan"] > 0


def test_an_engine_in_parts_denoises_as_a_whole_one(bundles, tmp_path):
    bundle = Bundle.open(bundles["sd1_two_levels"])
    for graph in (bundle.graph("unet"), bundle.graph("unet", "body")):
        store.build(bundle, graph[0], bundle.config(graph[0], backend="openvino", size=(64, 96), batch=2))
    status, report = compared(bundle, tmp_path, "--steps", 3, "--backend", "openvino")
    at_size = [t for t in report["trajectories"] if store.Record.read(
        next(path for path in store.engine_directories(bundle) if path.name == t["name"]), "").config.dtype == "fp32"]
    assert status == 0 and len(at_size) >= 2
    assert all(t["picture"]["max_abs"] <= IMAGE_MAX for t in at_size)


def test_engines_that_cannot_be_compared_are_left_out_with_the_reason(bundle, tmp_path, capsys):
    path = store.build(bundle, "unet", config(bundle))
    record = json.loads((path / "engine.json").read_text())
    record["key"]["versions"]["openvino"] = "1"
    (path / "engine.json").write_text(json.dumps(record))
    status, report = compared(bundle, tmp_path)
    assert status == 0 and report["trajectories"] == []
    assert report["left_out"][path.name].startswith("stale, not used: versions.openvino: \"1\" → ")
    out = capsys.readouterr().out
    assert f"left out: {path.name}: stale" in out
    assert f"build one with: python -m engines build {bundle.path} --component unet" in out
    (path / "engine.json").write_text("{}")
    assert "not a readable engine record" in compared(bundle, tmp_path)[1]["left_out"][path.name]


@pytest.mark.parametrize(("words", "message"), [
    (["--scheduler", "heat"], "scheduler: got 'heat', expected one of"),
    (["--steps", "1000"], "timesteps: got 1 … 1000, expected 0 … 999; use fewer steps"),
], ids=["scheduler", "steps"])
def test_what_the_runtime_refuses_is_refused(bundle, words, message, capsys):
    assert main(["trajectory", str(bundle.path), *words]) == 2
    assert message in capsys.readouterr().err


def test_another_form_of_guidance_is_refused(bundle):
    manifest = {**vars(bundle.manifest), "guidance": Guidance(form="embedded", input="guidance")}
    other = Bundle(bundle.path, bundle.manifest.__class__(**manifest))
    with pytest.raises(EngineError, match="got a model with guidance 'embedded', expected 'classifier-free'"):
        denoising.compare(other, {}, make_table(SCHEDULE, 2), 7.5)
