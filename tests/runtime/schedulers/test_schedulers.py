"""Sampler tables against diffusers' scheduler classes, side by side on the same fake model and the same noise."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_euler_ancestral_discrete
from diffusers.utils import logging

from kernels.host.step import advance, initial_state
from runtime.schedulers import SCHEDULERS, Table, make_table, names
from runtime.schedulers.config import DEFAULTS, SPACINGS, resolve
from tests.tolerances import SCHEDULER_REL

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]

SHAPE = (4, 8, 8)
STEPS = (1, 2, 7, 20, 30, 37, 50)

STABLE = {"_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
          "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True,
          "steps_offset": 1, "trained_betas": None}
"""The scheduler_config of Stable Diffusion 1."""

MIX = np.random.default_rng(7).standard_normal((4, 4)).astype(np.float32) / 2


@pytest.fixture(autouse=True, scope="module")
def _quiet_and_single_threaded() -> Iterator[None]:
    verbosity, threads = logging.get_verbosity(), torch.get_num_threads()
    logging.set_verbosity(logging.CRITICAL)
    torch.set_num_threads(1)
    yield
    logging.set_verbosity(verbosity)
    torch.set_num_threads(threads)


def model(x: np.ndarray, t: float) -> np.ndarray:
    """A smooth model output that depends on the sample and the timestep: [C, h, w] to the same, in its dtype."""
    t = float(t) / 300
    mixed = np.tensordot(MIX, x.astype(np.float64), 1)
    return (np.tanh(mixed * (1 + 0.3 * np.sin(t))) + 0.4 * np.sin(3 * t + x)).astype(x.dtype)


def reference(config: Mapping[str, Any], scheduler: str | None) -> Any:
    """diffusers' own scheduler for what `make_table` is given."""
    return copy.copy(_built(json.dumps(dict(config)), scheduler))  # set_timesteps begins a run anew


@functools.lru_cache(maxsize=64)
def _built(config: str, scheduler: str | None) -> Any:
    settings, base = json.loads(config), scheduler
    overrides: dict[str, Any] = {}
    if scheduler is not None and scheduler not in DEFAULTS:
        suffix = next((s for s in SPACINGS if scheduler.endswith(s)), "")
        base, overrides = SCHEDULERS[scheduler.removesuffix(suffix)]
        overrides = overrides | SPACINGS.get(suffix, {})
    return getattr(diffusers, base or settings["_class_name"]).from_config(settings, **overrides)


class Double(torch.Tensor):
    """A float64 sample that stays one where a diffusers class would round it to float32."""

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self


def promote(scheduler: Any) -> None:
    """Let a diffusers class compute in float64 from its own float32 schedule."""
    for name in ("alphas_cumprod", "final_alpha_cumprod", "sigmas", "sigmas_interpol"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())


def draw_as_in_float32(shape: tuple[int, ...], generator: torch.Generator, **_: Any) -> torch.Tensor:
    """Stands in for diffusers' randn_tensor, which would draw other numbers for a float64 sample."""
    return torch.randn(shape, generator=generator).double().as_subclass(Double)


def run_reference(scheduler: Any, steps: int | None, *, eta: float = 0.0, timesteps: list[float] | None = None,
                  start: int = 0, double: bool = False) -> tuple[np.ndarray, list[float], list[bool]]:
    """(every sample from the initial one on, the timesteps, whether each step drew noise) of a diffusers class."""
    if timesteps is None:
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(timesteps=timesteps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    if double:
        promote(scheduler)
    generator = torch.Generator("cpu").manual_seed(3)
    x = torch.randn((1, *SHAPE), generator=generator)
    x = (x.double().as_subclass(Double) if double else x) * scheduler.init_noise_sigma
    samples, draws = [x.numpy()[0]], []
    options: dict[str, Any] = {}
    if "eta" in scheduler.step.__code__.co_varnames:
        options["eta"] = eta
    if "generator" in scheduler.step.__code__.co_varnames:
        options["generator"] = generator
    times = scheduler.timesteps[start:]
    for t in times:
        m = torch.from_numpy(model(scheduler.scale_model_input(x, t).numpy()[0], float(t)))[None]
        before = generator.get_state()
        x = scheduler.step(m.as_subclass(Double) if double else m, t, x, **options).prev_sample
        draws.append(not torch.equal(before, generator.get_state()))
        samples.append(x.numpy()[0])
    return np.stack(samples), [float(t) for t in times], draws


def run_table(table: Table, dtype: type = np.float32) -> np.ndarray:
    """Every sample of a table's run, from the initial one on, with the noise in the order it asks for."""
    generator = torch.Generator("cpu").manual_seed(3)
    noise = torch.randn(SHAPE, generator=generator).numpy()
    state: np.ndarray = initial_state(table, noise).astype(dtype)
    if dtype is np.float64:
        state[0] = noise.astype(dtype) * table.init_scale
    samples = [state[0].copy()]
    for i in range(table.rows):
        m = model(dtype(table.input_scale[i]) * state[0], table.timesteps[i])
        noise = torch.randn(SHAPE, generator=generator).numpy() if table.draws[i] else None
        (advance if dtype is np.float32 else advance_in_double)(state, m, noise, table, i)
        samples.append(state[0].copy())
    return np.stack(samples)


def advance_in_double(state: np.ndarray, m: np.ndarray, noise: np.ndarray | None, table: Table, i: int) -> None:
    """What Table says, word for word, in float64."""
    p = table.predict[i, 0] * state[0] + table.predict[i, 1] * m
    if table.clip[i] > 0:
        p = p.clip(-table.clip[i], table.clip[i])
    noise = np.zeros_like(m) if noise is None else noise
    state[:] = np.tensordot(table.mix[i], np.stack([state[0], p, *state[1:], noise, m]), 1)


def difference(got: np.ndarray, samples: np.ndarray) -> float:
    """Largest difference of any sample of the run, over the largest value of that sample."""
    assert got.shape == samples.shape
    axes = (1, 2, 3)
    return float((np.abs(got - samples).max(axes) / np.abs(samples).max(axes)).max())


def check(config: Mapping[str, Any], scheduler: str | None, steps: int | None, *, eta: float = 0.0,
          timesteps: list[float] | None = None, start: int = 0, double: bool = False) -> Table:
    """The whole comparison with diffusers: timesteps, noise draws, every sample, the forward process at every row."""
    truth = reference(config, scheduler)
    samples, times, draws = run_reference(truth, steps, eta=eta, timesteps=timesteps, start=start,
                                          double=double)
    assert np.isfinite(samples).all(), "diffusers itself is not finite: not a case for this comparison"
    table = make_table(config, steps, scheduler=scheduler, eta=eta, timesteps=timesteps, start=start)
    # Fractional timesteps are float32 functions of logarithms in diffusers: a unit in the last place at 999 is 6e-5.
    np.testing.assert_allclose(table.timesteps, times, rtol=0, atol=2e-4)
    assert table.draws.tolist() == draws
    assert table.order == truth.order
    assert difference(run_table(table), samples) <= SCHEDULER_REL
    check_forward_process(table, truth, start)
    return table


def check_forward_process(table: Table, truth: Any, start: int) -> None:
    clean, noise = torch.full((1, 1), 0.7), torch.full((1, 1), -1.3)
    for i in range(table.rows):
        if hasattr(truth, "set_begin_index"):
            truth._step_index = None
            truth.set_begin_index(start + i)
        expected = truth.add_noise(clean, noise, truth.timesteps[start + i:start + i + 1]).item()
        assert table.signal[i] * 0.7 - table.sigma[i] * 1.3 == pytest.approx(expected, rel=1e-6, abs=1e-6)


def with_config(**changes: Any) -> dict[str, Any]:
    return STABLE | changes


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", names())
def test_whole_run_matches_diffusers(scheduler: str, prediction_type: str, steps: int) -> None:
    """Both sides in float32, diffusers unchanged; most agree to 2e-6. The exception is two steps of Heun, whose second
    divides a rounded difference by a sigma of 0.03 and multiplies it with 14.6: there diffusers in float32 is 9e-6 from
    itself in float64, and the comparison is with the latter."""
    check(with_config(prediction_type=prediction_type), scheduler, steps,
          double=scheduler.startswith("heun") and steps == 2)


SPACING = ("leading", "trailing", "linspace")
SCHEDULE_OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained_betas": {"trained_betas": (np.linspace(0.01, 0.1, 1000) ** 2).tolist()},
    "100_training_steps": {"num_train_timesteps": 100, "beta_start": 0.0085, "beta_end": 0.12},
    "no_offset": {"steps_offset": 0},
    **{spacing: {"timestep_spacing": spacing} for spacing in SPACING},
}


@pytest.mark.parametrize("schedule", SCHEDULE_OPTIONS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedule_options(scheduler: str, schedule: str) -> None:
    if (scheduler, schedule) == ("heun", "cosine"):
        pytest.skip("ill-conditioned in float32: test_where_float32_is_not_enough has it")
    for steps in (7, 37):
        check(with_config(**SCHEDULE_OPTIONS[schedule]), scheduler, steps)


SOLVER_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim-alpha_one": ("ddim", {"set_alpha_to_one": True}),
    "ddim-clip": ("ddim", {"clip_sample": True, "clip_sample_range": 0.8}),
    "ddim-clip-v": ("ddim", {"clip_sample": True, "prediction_type": "v_prediction"}),
    "ddim-sample": ("ddim", {"prediction_type": "sample"}),
    "ddim-zero_snr": ("ddim", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction",
                               "timestep_spacing": "trailing"}),
    "ddpm-clip": ("ddpm", {"clip_sample": True, "clip_sample_range": 1.5}),
    "ddpm-fixed_small_log": ("ddpm", {"variance_type": "fixed_small_log"}),
    "ddpm-fixed_large": ("ddpm", {"variance_type": "fixed_large"}),
    "ddpm-sample": ("ddpm", {"prediction_type": "sample"}),
    "ddpm-zero_snr": ("ddpm", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction",
                               "timestep_spacing": "trailing"}),
    "pndm-runge_kutta": ("pndm", {"skip_prk_steps": False}),
    "pndm-runge_kutta-v": ("pndm", {"skip_prk_steps": False, "prediction_type": "v_prediction"}),
    "pndm-runge_kutta-trailing": ("pndm", {"skip_prk_steps": False, "timestep_spacing": "trailing", "steps_offset": 0}),
    "pndm-alpha_one": ("pndm", {"set_alpha_to_one": True}),
    "lms-sample": ("lms", {"prediction_type": "sample"}),
    "euler-sample": ("euler", {"prediction_type": "sample"}),
    "euler-sigma_min": ("euler", {"final_sigmas_type": "sigma_min"}),
    "euler-karras-bounds": ("euler_karras", {"sigma_min": 0.05, "sigma_max": 10.0}),
    "euler-exponential-bounds": ("euler_exponential", {"sigma_min": 0.05, "sigma_max": 10.0}),
    "euler-continuous-v": ("euler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
    "heun-clip": ("heun", {"clip_sample": True}),
    "heun-clip-v": ("heun", {"clip_sample": True, "clip_sample_range": 0.7, "prediction_type": "v_prediction"}),
    "heun-sample": ("heun", {"prediction_type": "sample"}),
    "lcm-clip": ("lcm", {"clip_sample": True}),
    "lcm-sample": ("lcm", {"prediction_type": "sample"}),
    "lcm-original_100": ("lcm", {"original_inference_steps": 100, "timestep_scaling": 3.0}),
    "lcm-zero_snr": ("lcm", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    "dpm-lambda_min": ("dpm++_2m", {"lambda_min_clipped": -2.0}),
    "dpm-euler_at_final": ("dpm++_2m", {"euler_at_final": True, "final_sigmas_type": "sigma_min"}),
    "dpm-not_lower_final": ("dpm++_2m", {"lower_order_final": False}),
    "dpm-not_lower_sigma_min": ("dpm++_2m", {"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
    "dpm-sample": ("dpm++_2m", {"prediction_type": "sample"}),
    "dpm-zero_snr": ("dpm++_2m", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction",
                                  "timestep_spacing": "trailing"}),
    "dpm-karras-cosine": ("dpm++_2m_karras", {"beta_schedule": "squaredcos_cap_v2"}),
    "dpm-karras-lambda_min": ("dpm++_2m_karras", {"lambda_min_clipped": -2.0, "timestep_spacing": "trailing"}),
    "dpm-karras-sigma_min": ("dpm++_2m_karras", {"final_sigmas_type": "sigma_min"}),
    "unipc-zero_snr": ("unipc", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction",
                                 "timestep_spacing": "trailing"}),
    "unipc-sample": ("unipc", {"prediction_type": "sample"}),
    "unipc-disable_corrector": ("unipc", {"disable_corrector": [0, 1, 5]}),
    "unipc-sigma_min": ("unipc", {"final_sigmas_type": "sigma_min"}),
    "unipc-karras-sigma_min": ("unipc_karras", {"final_sigmas_type": "sigma_min"}),
    "unipc-exponential-bounds": ("unipc_exponential", {"sigma_min": 0.05, "sigma_max": 10.0}),
    "unipc-not_lower_final": ("unipc", {"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
}


@pytest.mark.parametrize("steps", [4, 37])
@pytest.mark.parametrize(("scheduler", "options"), SOLVER_OPTIONS.values(), ids=SOLVER_OPTIONS)
def test_solver_options(scheduler: str, options: dict[str, Any], steps: int) -> None:
    check(with_config(**options), scheduler, steps)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"])
def test_dpm_solver_algorithms(algorithm: str, solver_type: str, order: int, prediction_type: str) -> None:
    config = with_config(algorithm_type=algorithm, solver_type=solver_type, solver_order=order,
                         prediction_type=prediction_type,
                         final_sigmas_type="zero" if algorithm.endswith("++") else "sigma_min")
    if algorithm == "sde-dpmsolver" and order == 3:  # diffusers has no such update: UnboundLocalError
        with pytest.raises(ValueError, match=r"solver_order: got 3 .* expected 1 or 2"):
            make_table(config, 20, scheduler="DPMSolverMultistepScheduler")
        return
    for steps in (1, 7, 20):
        check(config, "DPMSolverMultistepScheduler", steps)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("predict_x0", [True, False], ids=["x0", "noise"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
def test_unipc_variants(solver_type: str, order: int, predict_x0: bool, prediction_type: str) -> None:
    config = with_config(solver_type=solver_type, solver_order=order, predict_x0=predict_x0,
                         prediction_type=prediction_type, final_sigmas_type="sigma_min")
    for steps in (7, 20):
        check(config, "unipc", steps)


ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
ILL_CONDITIONED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "euler-zero_snr-4": ("euler", 4, ZERO_SNR),
    "euler-zero_snr-20": ("euler", 20, ZERO_SNR),
    "euler_ancestral-zero_snr-4": ("euler_ancestral", 4, ZERO_SNR),
    "euler_ancestral-zero_snr-20": ("euler_ancestral", 20, ZERO_SNR),
    **{f"heun-cosine-{steps}": ("heun", steps, {"beta_schedule": "squaredcos_cap_v2"}) for steps in (3, 7, 20, 37)},
    "heun-2": ("heun", 2, {}),
    "unipc-noise_of_sample-2": ("unipc", 2, {"predict_x0": False, "prediction_type": "sample",
                                             "final_sigmas_type": "sigma_min"}),
}


@pytest.mark.parametrize(("scheduler", "steps", "options"), ILL_CONDITIONED.values(), ids=ILL_CONDITIONED)
def test_where_float32_is_not_enough(scheduler: str, steps: int, options: dict[str, Any],
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs whose first sigma is in the thousands, or whose steps multiply a rounded difference by hundreds, differ by
    more than the tolerance between any two orders of the same float32 operations. Here the truth is diffusers' class
    computing in float64 from its own float32 schedule: our table in float64 must agree with it, and in float32 be as
    close to it as diffusers in float32 is, within a factor of two."""
    config = with_config(**options)
    rounded = run_reference(reference(config, scheduler), steps)[0]
    monkeypatch.setattr(scheduling_euler_ancestral_discrete, "randn_tensor", draw_as_in_float32)
    truth = run_reference(reference(config, scheduler), steps, double=True)[0]
    table = make_table(config, steps, scheduler=scheduler)
    assert truth.dtype == np.float64
    assert difference(run_table(table, np.float64), truth) <= SCHEDULER_REL
    assert difference(run_table(table), truth) <= 2 * difference(rounded, truth) + SCHEDULER_REL


@pytest.mark.parametrize("scheduler", names())
def test_start_of_image_to_image(scheduler: str) -> None:
    """A run that skips steps has no memory of them: every row as diffusers' after set_begin_index."""
    order = make_table(STABLE, 20, scheduler=scheduler).order
    for skipped in (1, 6, 19):
        check(STABLE, scheduler, 20, start=skipped * order)


def test_start_within_runge_kutta() -> None:
    for start in (3, 8, 14):
        check(with_config(skip_prk_steps=False), "pndm", 20, start=start)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("options", [{}, {"clip_sample": True, "set_alpha_to_one": True}], ids=["plain", "clip"])
def test_ddim_eta(eta: float, options: dict[str, Any]) -> None:
    for steps in (2, 20):
        assert check(with_config(**options), "ddim", steps, eta=eta).draws.all()


@pytest.mark.parametrize(("scheduler", "timesteps"), [
    ("ddpm", [900, 500, 3]), ("ddpm", [0]), ("euler", [900.5, 500, 3]), ("heun", [900, 500, 3]),
    ("dpm++_2m", [900, 500, 3]), ("dpm++_2m_sde", [999]), ("lcm", [999, 499, 19])], ids=str)
def test_custom_timesteps(scheduler: str, timesteps: list[float]) -> None:
    check(STABLE, scheduler, None, timesteps=timesteps)


@pytest.mark.parametrize(("scheduler", "rows"), [
    ("ddpm", 20), ("ddim", 0), ("pndm", 0), ("lms", 0), ("euler", 0), ("euler_ancestral", 20), ("heun", 0), ("dpm2", 0),
    ("dpm++_2m", 0), ("dpm++_2m_sde", 20), ("unipc", 0), ("lcm", 19)])
def test_how_many_rows_draw_noise(scheduler: str, rows: int) -> None:
    assert make_table(STABLE, 20, scheduler=scheduler).draws.sum() == rows


@pytest.mark.parametrize("cls", DEFAULTS)
def test_defaults_are_those_of_the_class(cls: str) -> None:
    """An empty config means the class's defaults, key by key and as a table."""
    defaults = dict(getattr(diffusers, cls)().config)
    for key, value in DEFAULTS[cls].items():
        if key not in ("sigma_min", "sigma_max"):  # read from any config, declared by two classes only
            assert defaults[key] == (list(value) if isinstance(value, tuple) else value), key
    # PNDM's default begins with Runge-Kutta steps, which need four steps at least.
    check({"_class_name": cls}, None, 20)


def test_a_live_config_carries_over_without_its_defaults() -> None:
    """`dict(scheduler.config)` lists what was never set, and the next class then takes its own default for it."""
    live = dict(diffusers.PNDMScheduler.from_config(STABLE).config)
    assert "timestep_spacing" in live["_use_default_values"]
    assert resolve(live, "euler")[1]["timestep_spacing"] == "linspace"
    check(live, "euler", 20)


def test_overrides_carry_over_what_the_config_sets() -> None:
    config = with_config(timestep_spacing="trailing", prediction_type="v_prediction", solver_type="bh1",
                         use_karras_sigmas=True)
    _, settings = resolve(config, "dpm++_2m_exponential")
    assert (settings["timestep_spacing"], settings["prediction_type"]) == ("trailing", "v_prediction")
    assert settings["use_exponential_sigmas"] and not settings["use_karras_sigmas"]
    check(config, "dpm++_2m_exponential", 20)
    check(config, "DPMSolverMultistepScheduler", 20)


FINITE_WHERE_DIFFUSERS_IS_NOT = {
    # bh1 multiplies an infinite B(h) with no correction at all; its first order is the clean prediction.
    "bh1-zero": ("unipc", {"solver_type": "bh1"}),
    # sigma * expm1(h) is 0 * infinity; it is alpha * (sigma_now - sigma_next) of x0 + sigma * noise.
    "noise-zero": ("unipc", {"predict_x0": False}),
    # The last of Karras' sigmas is where the run ends already: a step of no length, written 0 / 0.
    "heun-no_last_step": ("dpm++_2m_karras", {"solver_type": "heun", "final_sigmas_type": "sigma_min"}),
}


@pytest.mark.parametrize(("scheduler", "options"), FINITE_WHERE_DIFFUSERS_IS_NOT.values(),
                         ids=FINITE_WHERE_DIFFUSERS_IS_NOT)
def test_finite_where_diffusers_is_not(scheduler: str, options: dict[str, Any]) -> None:
    """diffusers' last sample is NaN. Ours is the limit: what the last evaluation predicts, or no change."""
    config = with_config(**options)
    samples = run_reference(reference(config, scheduler), 20)[0]
    table = make_table(config, 20, scheduler=scheduler)
    got = run_table(table)
    assert np.isnan(samples[-1]).any()
    assert difference(got[:-1], samples[:-1]) <= SCHEDULER_REL
    last = got[-2]
    if scheduler == "unipc":
        m = model(last, table.timesteps[-1])
        last = (last - table.sigma[-1] * m) / table.signal[-1]
    np.testing.assert_allclose(got[-1], last, rtol=0, atol=0.05 * np.abs(last).max())  # less the corrector's share


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm++_2m", "unipc"])
def test_trailing_has_as_many_steps_as_asked_for(scheduler: str) -> None:
    """1000 / 61 summed in floating point leaves diffusers a 62nd timestep, -1: the last trained one for DDIM."""
    config = with_config(timestep_spacing="trailing")
    truth = reference(config, scheduler)
    truth.set_timesteps(61)
    assert truth.timesteps[60:].tolist() == [15, -1]
    np.testing.assert_array_equal(make_table(config, 61, scheduler=scheduler).timesteps, truth.timesteps[:61])


def test_a_wrong_coefficient_is_noticed() -> None:
    """One percent on one number of one row."""
    samples = run_reference(reference(STABLE, "dpm++_2m"), 20)[0]
    table = make_table(STABLE, 20, scheduler="dpm++_2m")
    mix = table.mix.copy()
    mix[7, 0, 2] *= 1.01
    assert difference(run_table(table), samples) <= SCHEDULER_REL
    assert difference(run_table(dataclasses.replace(table, mix=mix)), samples) > 10 * SCHEDULER_REL


def test_tables_are_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        make_table(STABLE, 4).mix[0, 0, 0] = 1


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "unknown": ({}, {"scheduler": "dpm3"}, r"scheduler: got 'dpm3', expected one of ddpm, .*UniPC"),
    "unknown-class": ({"_class_name": "EDMEulerScheduler"}, {}, r"got 'EDMEulerScheduler', expected one of"),
    "no-class": ({"_class_name": None}, {}, r"scheduler: got None, expected"),
    "karras-ddim": ({}, {"scheduler": "ddim_karras"}, r"ddim has no karras sigmas, expected one of lms_karras"),
    "exponential-lcm": ({}, {"scheduler": "lcm_exponential"}, r"lcm has no exponential sigmas"),
    "thresholding": ({"thresholding": True}, {"scheduler": "ddim"}, r"thresholding: got True .* expected it unset"),
    "beta-sigmas": ({"use_beta_sigmas": True}, {"scheduler": "euler"}, r"use_beta_sigmas: got True"),
    "lu": ({"use_lu_lambdas": True}, {"scheduler": "dpm++_2m"}, r"use_lu_lambdas: got True"),
    "flow": ({"use_flow_sigmas": True}, {"scheduler": "unipc"}, r"use_flow_sigmas: got True"),
    "both": ({"use_karras_sigmas": True, "use_exponential_sigmas": True}, {"scheduler": "euler"}, r"at most one"),
    "learned": ({"variance_type": "learned_range"}, {"scheduler": "ddpm"}, r"variance_type: got 'learned_range'"),
    "large_log": ({"variance_type": "fixed_large_log"}, {"scheduler": "ddpm"}, r"variance_type: got 'fixed_large_log'"),
    "sample-pndm": ({"prediction_type": "sample"}, {}, r"prediction_type: got 'sample' for PNDM"),
    "beta_schedule": ({"beta_schedule": "sigmoid"}, {}, r"beta_schedule: got 'sigmoid' .* expected one of"),
    "spacing": ({"timestep_spacing": "even"}, {}, r"timestep_spacing: got 'even'"),
    "dpmsolver-zero": ({"algorithm_type": "dpmsolver"}, {"scheduler": "DPMSolverMultistepScheduler"}, r"set that"),
    "zero": ({}, {"steps": 0}, r"steps: got 0, expected a whole number of at least 1"),
    "negative": ({}, {"steps": -3}, r"steps: got -3"),
    "fraction": ({}, {"steps": 2.5}, r"steps: got 2.5"),
    "bool": ({}, {"steps": True}, r"steps: got True"),
    "none": ({}, {"steps": None}, r"steps: got None"),
    "too-many": ({}, {"steps": 1001, "scheduler": "ddim"}, r"steps: got 1001, expected at most the 1000"),
    "off-the-end": ({}, {"steps": 1000, "scheduler": "ddim"}, r"timesteps: got 1 … 1000, expected 0 … 999"),
    "coinciding": ({}, {"steps": 1000, "scheduler": "unipc"}, r"got 1000 steps, for which two noise levels coincide"),
    "coinciding-dpm": ({}, {"steps": 1000, "scheduler": "dpm++_2m"}, r"mix: got a value that is not finite in row 500"),
    "lcm-too-many": ({}, {"steps": 51, "scheduler": "lcm"}, r"steps: got 51 with original_inference_steps 50"),
    "runge-kutta-3": ({"skip_prk_steps": False}, {"steps": 3}, r"skip_prk_steps false, expected at least 4"),
    "zero_snr-epsilon": ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, {"scheduler": "ddim"},
                         r"timestep 999 of pure noise .* expected 'v_prediction'"),
    "unipc-infinite": ({"lower_order_final": False}, {"scheduler": "unipc"}, r"not finite in row 19"),
    "eta-euler": ({}, {"scheduler": "euler", "eta": 0.5}, r"eta: got 0.5 for EulerDiscrete.* only DDIMScheduler"),
    "eta-negative": ({}, {"scheduler": "ddim", "eta": -1.0}, r"eta: got -1.0"),
    "eta-nan": ({}, {"scheduler": "ddim", "eta": float("nan")}, r"eta: got nan"),
    "timesteps-pndm": ({}, {"steps": None, "timesteps": [5, 3]}, r"timesteps: got a list for PNDM"),
    "timesteps-karras": ({}, {"steps": None, "timesteps": [5, 3], "scheduler": "euler_karras"}, r"list with Karras"),
    "timesteps-karras-dpm": ({}, {"steps": None, "timesteps": [5, 3], "scheduler": "dpm++_2m_karras"}, r"with Karras"),
    "timesteps-and-steps": ({}, {"timesteps": [5, 3], "scheduler": "euler"}, r"got a list and steps 20"),
    "timesteps-rising": ({}, {"steps": None, "timesteps": [3, 5], "scheduler": "ddpm"}, r"expected descending"),
    "timesteps-range": ({}, {"steps": None, "timesteps": [1000, 5], "scheduler": "lcm"}, r"expected 0 … 999"),
    "timesteps-empty": ({}, {"steps": None, "timesteps": [], "scheduler": "ddpm"}, r"at least one number"),
    "start-odd": ({}, {"scheduler": "heun", "start": 3}, r"start: got row 3, expected an even one"),
    "start-far": ({}, {"start": 21}, r"got no rows"),
    "start-negative": ({}, {"start": -1}, r"start: got -1"),
}


@pytest.mark.parametrize(("config", "arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(config: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_table(with_config(**config), **{"steps": 20, **arguments})


def test_table_refuses_what_does_not_fit() -> None:
    table = make_table(STABLE, 4)
    with pytest.raises(ValueError, match=r"clip: got shape \(2,\), expected \(5,\)"):
        dataclasses.replace(table, clip=np.zeros(2))
    with pytest.raises(ValueError, match="sigma: got a value that is not finite in row 0"):
        dataclasses.replace(table, sigma=np.full(5, np.nan))
