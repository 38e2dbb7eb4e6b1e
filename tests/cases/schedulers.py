"""Runs of sampler tables and of diffusers' scheduler classes, on one fake model and the same noise."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from kernels.host.step import advance, initial_state
from runtime.schedulers import SCHEDULERS, Table, make_table
from runtime.schedulers.config import DEFAULTS, SPACINGS
from tests.tolerances import SCHEDULER_REL

SHAPE = (4, 8, 8)

STABLE = {"_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
          "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True,
          "steps_offset": 1, "trained_betas": None}
"""The scheduler_config of Stable Diffusion 1."""

MIX = np.random.default_rng(7).standard_normal((4, 4)).astype(np.float32) / 2


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
