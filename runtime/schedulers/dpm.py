"""DPM-Solver and DPM-Solver++, multistep, ODE and SDE; arXiv 2206.00927 and 2211.01095."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from runtime.schedulers.config import Settings
from runtime.schedulers.logsnr import Point, log_snr_levels, points
from runtime.schedulers.predict import noise_from, x0_from
from runtime.schedulers.schedule import trained_signal, whole_timesteps
from runtime.schedulers.table import Row, Table, Vector, columns

_FEW_STEPS = 15
"""Below this many steps lower_order_final lowers the order of the last ones (diffusers' stabilisation)."""


def dpm(settings: Settings, steps: int | None, timesteps: Sequence[float] | None, start: int) -> Table:
    """Orders 1 to 3 of the four algorithms. Memory: the previous solver_order - 1 predictions."""
    order = settings["solver_order"]
    x, p, memory, noise, _ = columns(order - 1)
    times, levels = _levels(settings, steps, timesteps)
    predict_x0 = settings["algorithm_type"].endswith("++")
    stochastic = settings["algorithm_type"].startswith("sde")
    convert = x0_from if predict_x0 else noise_from
    rows = []
    for i in range(start, len(times)):
        now, then = levels[i], levels[i + 1]
        this_order = min(order, i - start + 1, _allowed(settings, i, len(times)))
        if then == now:  # no way to go: nothing changes at any order, and the higher ones divide by its length
            this_order = 1
        predictions = [p, *memory][:this_order]
        differences = _differences(predictions, levels[i - this_order + 1:i + 2])
        keep, weights, up = _weights(settings, now, then, this_order)
        update = keep * x + sum(w * d for w, d in zip(weights, differences, strict=True)) + up * noise
        rows.append(Row(times[i], convert(settings["prediction_type"], now.alpha, now.noise),
                        [update, *[p, *memory][:order - 1]], now.alpha, now.noise, draws=stochastic))
    return Table.of(rows)


def _levels(settings: Settings, steps: int | None, timesteps: Sequence[float] | None) -> tuple[np.ndarray, list[Point]]:
    signal = trained_signal(settings)
    if timesteps is not None:
        times = np.array(timesteps, np.float64).astype(np.int64)
    else:
        log_snr = 0.5 * (np.log(signal) - np.log(1 - signal))
        last = len(signal) - int(np.searchsorted(log_snr[::-1], np.float32(settings["lambda_min_clipped"])))
        times = whole_timesteps(settings, steps or 0, beyond=settings["timestep_spacing"] != "trailing", last=last)
    levels = log_snr_levels(settings, signal, times, steps,
                            rounded=settings["beta_schedule"] != "squaredcos_cap_v2")
    return levels.timesteps, points(levels)


def _allowed(settings: Settings, i: int, steps: int) -> int:
    """The highest order that the row may have for being close to the end."""
    few = settings["lower_order_final"] and steps < _FEW_STEPS
    if i == steps - 1 and (few or settings["euler_at_final"] or settings["final_sigmas_type"] == "zero"):
        return 1
    return 2 if i == steps - 2 and few else 3


def _differences(predictions: list[Vector], levels: Sequence[Point]) -> list[Vector]:
    """The newest prediction and its divided differences in log SNR, per step length (arXiv 2211.01095 appendix B)."""
    if len(predictions) == 1:
        return predictions
    log_snr = [level.log_snr for level in reversed(levels)]
    h = log_snr[0] - log_snr[1]
    r0 = (log_snr[1] - log_snr[2]) / h
    first = (predictions[0] - predictions[1]) / r0
    if len(predictions) == 2:
        return [predictions[0], first]
    r1 = (log_snr[2] - log_snr[3]) / h
    older = (predictions[1] - predictions[2]) / r1
    return [predictions[0], first + r0 / (r0 + r1) * (first - older), (first - older) / (r0 + r1)]


def _weights(settings: Settings, now: Point, then: Point, order: int) -> tuple[float, list[float], float]:
    """(of x, of the differences, of the noise) in a step; exp(-h) is the ratio of the sigmas.

    With x0, the SDE is the ODE with 2h for h in the integrals. With noise it doubles them.
    """
    h = then.log_snr - now.log_snr
    midpoint = settings["solver_type"] != "heun"  # UniPC's names mean midpoint here, as in diffusers
    ratio = then.sigma / now.sigma
    if settings["algorithm_type"].endswith("++"):
        stochastic = settings["algorithm_type"].startswith("sde")
        decay, span = (ratio**2, 2 * h) if stochastic else (ratio, h)
        integral = 1 - decay
        weights = [integral]
        if order == 2 and midpoint:
            weights.append(0.5 * integral)
        elif order >= 2:
            weights.append(1 - integral / span)
        if order == 3:
            # The sign for the SDE is diffusers' own; the series of the term before it suggests + 0.5.
            weights.append((integral - span) / span**2 + (-0.5 if stochastic else 0.5))
        keep = then.noise / now.noise * (ratio if stochastic else 1.0)
        up = then.noise * math.sqrt(1 - ratio**2) if stochastic else 0.0
        return keep, [then.alpha * w for w in weights], up
    return _noise_weights(settings, now, then, order, h, midpoint)


def _noise_weights(settings: Settings, now: Point, then: Point, order: int, h: float,
                   midpoint: bool) -> tuple[float, list[float], float]:
    stochastic = settings["algorithm_type"].startswith("sde")
    twice = 2.0 if stochastic else 1.0
    integral = then.alpha * (now.sigma - then.sigma)  # sigma * (exp(h) - 1)
    weights = [-twice * integral]
    if order == 2 and midpoint:
        weights.append(-twice * 0.5 * integral)
    elif order >= 2:
        weights.append(-twice * (integral / h - then.noise))
    if order == 3:
        weights.append(-((integral - then.noise * h) / h**2 - 0.5 * then.noise))
    up = then.alpha * math.sqrt(now.sigma**2 - then.sigma**2) if stochastic else 0.0
    return then.alpha / now.alpha, weights, up
