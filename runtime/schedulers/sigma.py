"""Samplers whose x is x0 + sigma * noise (arXiv 2206.00364): Euler, Euler ancestral, Heun, DPM2 and LMS."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from runtime.schedulers.config import Settings
from runtime.schedulers.predict import noise_from, x0_from
from runtime.schedulers.schedule import (
    Levels,
    levels_at,
    respaced,
    sigma_timesteps,
    timestep_of,
    trained_signal,
    training_sigmas,
    wants_respacing,
)
from runtime.schedulers.table import Row, Table, Vector, columns

_LMS_ORDER = 4


def euler(settings: Settings, steps: int | None, timesteps: Sequence[float] | None, start: int) -> Table:
    """x moves along dx/dsigma = noise to the next sigma (arXiv 2206.00364 algorithm 1 without its second half)."""
    x, p, *_ = columns(0)
    levels = _levels(settings, steps, timesteps)
    sigmas, times = levels.sigmas, levels.timesteps
    if settings["timestep_type"] == "continuous" and settings["prediction_type"] == "v_prediction":
        times = 0.25 * np.log(sigmas[:-1])
    rows = [_row(settings, times[i], sigmas[i], [x + (sigmas[i + 1] - sigmas[i]) * p])
            for i in range(start, len(times))]
    return Table.of(rows, init_scale=_init_scale(settings, sigmas))


def euler_ancestral(settings: Settings, steps: int, start: int) -> Table:
    """An Euler step past the next sigma and fresh noise back up to it, every step; ancestral as in arXiv 2006.11239."""
    x, p, _, noise, _ = columns(0)
    levels = _levels(settings, steps, None)
    rows = []
    for i in range(start, len(levels.timesteps)):
        now, then = levels.sigmas[i], levels.sigmas[i + 1]
        down, up = then**2 / now, then * max(1 - (then / now)**2, 0.0) ** 0.5
        rows.append(_row(settings, levels.timesteps[i], now, [x + (down - now) * p + up * noise], draws=True))
    return Table.of(rows, init_scale=_init_scale(settings, levels.sigmas))


def heun(settings: Settings, steps: int | None, timesteps: Sequence[float] | None, start: int) -> Table:
    """arXiv 2206.00364 algorithm 1: an Euler row, then a row that redoes it with the mean of both slopes.

    Memory: the sample plus half of the Euler step, to which the second row adds its half.
    """
    x, p, (half,), *_ = columns(1)
    levels = _levels(settings, steps, timesteps)
    rows = []
    for i, (now, then) in enumerate(zip(levels.sigmas[:-1], levels.sigmas[1:], strict=True)):
        step = then - now
        first, slope = _heun_row(settings, levels.timesteps[i], now, x, p)
        rows.append(first._replace(mix=[x + step * slope, x + step / 2 * slope]))
        if then > 0:
            second, slope = _heun_row(settings, levels.timesteps[i + 1], then, x, p)
            rows.append(second._replace(mix=[half + step / 2 * slope, half]))
    return Table.of(rows[_even(start):], init_scale=_init_scale(settings, levels.sigmas), order=2)


def dpm2(settings: Settings, steps: int, start: int) -> Table:
    """A step with the slope at the geometric mean of its sigmas (DPM-Solver-2, arXiv 2206.00927 §3.3, in sigma).

    Memory: the sample the step began with.
    """
    x, p, (begun,), *_ = columns(1)
    levels = _levels(settings, steps, None)
    signal = trained_signal(settings)
    times = levels.timesteps.round() if settings["use_karras_sigmas"] else levels.timesteps
    rows = []
    for i, (now, then) in enumerate(zip(levels.sigmas[:-1], levels.sigmas[1:], strict=True)):
        middle = (now * then)**0.5
        rows.append(_row(settings, times[i], now, [x + (middle - now) * p, x]))
        if then > 0:
            between = float(timestep_of(np.array([middle], np.float32), signal)[0])
            rows.append(_row(settings, between, middle, [begun + (then - now) * p, begun], level=then))
    return Table.of(rows[_even(start):], init_scale=_init_scale(settings, levels.sigmas), order=2)


def lms(settings: Settings, steps: int, start: int) -> Table:
    """Linear multistep of order 4: the polynomial through the last slopes, integrated exactly to the next sigma.

    Memory: the three slopes before this one. A run that starts later has none of them yet but keeps the weights of the
    full run's order, as diffusers does.
    """
    x, p, memory, *_ = columns(_LMS_ORDER - 1)
    levels = _levels(settings, steps, None)
    rows = []
    for i in range(start, len(levels.timesteps)):
        weights = _lagrange_integrals(levels.sigmas, i, min(i + 1, _LMS_ORDER))
        slopes = [p, *memory][:min(len(weights), i - start + 1)]
        update = x + sum(w * slope for w, slope in zip(weights[:len(slopes)], slopes, strict=True))
        rows.append(_row(settings, levels.timesteps[i], levels.sigmas[i], [update, p, *memory[:-1]]))
    return Table.of(rows, init_scale=_init_scale(settings, levels.sigmas))


def _lagrange_integrals(sigmas: np.ndarray, i: int, order: int) -> list[float]:
    """Integrals from sigmas[i] to sigmas[i + 1] of the Lagrange polynomials through sigmas[i], sigmas[i - 1] …"""
    nodes = sigmas[i - np.arange(order)] - sigmas[i]
    weights = []
    for k in range(order):
        others = np.delete(nodes, k)
        antiderivative = np.polyint(np.atleast_1d(np.poly(others)))
        weights.append(float(np.polyval(antiderivative, sigmas[i + 1] - sigmas[i]) / np.prod(nodes[k] - others)))
    return weights


def _levels(settings: Settings, steps: int | None, timesteps: Sequence[float] | None) -> Levels:
    signal = trained_signal(settings)
    if timesteps is not None and wants_respacing(settings):
        raise ValueError("timesteps: got a list with Karras or exponential sigmas, which choose the timesteps "
                         "themselves, expected one or the other; drop the list or the sigmas")
    given = np.array(timesteps, np.float32) if timesteps is not None else sigma_timesteps(settings, steps or 0)
    last = float(training_sigmas(signal)[0]) if settings.get("final_sigmas_type") == "sigma_min" else 0.0
    levels = levels_at(given, signal, last)
    if not wants_respacing(settings):
        return levels
    inner = np.interp(given, np.arange(len(signal)), training_sigmas(signal))
    return respaced(settings, signal, float(inner[0]), float(inner[-1]), steps or 0, last)


def _init_scale(settings: Settings, sigmas: np.ndarray) -> float:
    largest = float(sigmas.max())
    return largest if settings["timestep_spacing"] in ("linspace", "trailing") else math.hypot(largest, 1)


def _row(settings: Settings, timestep: float, sigma: float, mix: list[np.ndarray], *, draws: bool = False,
         level: float | None = None) -> Row:
    """A row whose p is the slope dx/dsigma. level: the sigma that image to image starts from, where not `sigma`."""
    alpha = 1 / math.hypot(sigma, 1)
    slope = noise_from(settings["prediction_type"], alpha, sigma * alpha, alpha)
    return Row(timestep, slope, mix, 1.0, sigma if level is None else level, input_scale=alpha, draws=draws)


def _heun_row(settings: Settings, timestep: float, sigma: float, x: Vector, p: Vector) -> tuple[Row, Vector]:
    """A row yet without its mix, and the slope in its terms: p itself, or taken from the clamped x0."""
    row = _row(settings, timestep, sigma, [])
    if not settings["clip_sample"]:
        return row, p
    predict = x0_from(settings["prediction_type"], row.input_scale, sigma * row.input_scale, row.input_scale)
    return row._replace(predict=predict, clip=settings["clip_sample_range"]), (x - p) / sigma


def _even(start: int) -> int:
    if start % 2:
        raise ValueError(f"start: got row {start}, expected an even one: this solver takes two rows a step; "
                         "skip steps * order rows")
    return start
