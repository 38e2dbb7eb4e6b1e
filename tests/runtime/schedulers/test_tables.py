"""Sampler tables: defaults, what carries over, finite numbers, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import diffusers
import numpy as np
import pytest

from runtime.schedulers import make_table
from runtime.schedulers.config import DEFAULTS, resolve
from tests.cases.schedulers import STABLE, check, difference, model, reference, run_reference, run_table, with_config
from tests.tolerances import SCHEDULER_REL

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]


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
