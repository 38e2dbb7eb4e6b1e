"""UniPC: a predictor, and a corrector that reuses the next row's model output; arXiv 2302.04867."""

from __future__ import annotations

import math

import numpy as np

from runtime.schedulers.config import Settings
from runtime.schedulers.logsnr import Point, log_snr_levels, points
from runtime.schedulers.predict import noise_from, x0_from
from runtime.schedulers.schedule import trained_signal, whole_timesteps
from runtime.schedulers.table import Row, Table, Vector, columns


def unipc(settings: Settings, steps: int, start: int) -> Table:
    """Orders 1 to 3 with B(h) of bh1 or bh2. Memory: the last corrected sample, then solver_order predictions."""
    order = settings["solver_order"]
    x, p, memory, *_ = columns(order + 1)
    corrected, history = memory[0], list(memory[1:])
    signal = trained_signal(settings)
    times = whole_timesteps(settings, steps, beyond=settings["timestep_spacing"] != "trailing")
    grid = log_snr_levels(settings, signal, times, steps, rounded=True, ends_at_smallest=True)
    levels, n = points(grid), len(grid.timesteps)
    convert = x0_from if settings["predict_x0"] else noise_from
    rows, last_order = [], 0
    for i in range(start, n):
        sample = x
        if last_order and i - 1 not in settings["disable_corrector"]:
            sample = _correct(settings, corrected, p, history[:last_order], levels[i - last_order:i + 1])
        final = n - i if settings["lower_order_final"] else order
        # A step of no length changes nothing at any order, and the higher ones divide by its length.
        last_order = min(order, final, i - start + 1) if levels[i + 1] != levels[i] else 1
        update = _predict(settings, sample, [p, *history][:last_order], levels[i - last_order + 1:i + 2])
        rows.append(Row(grid.timesteps[i], convert(settings["prediction_type"], levels[i].alpha, levels[i].noise),
                        [update, sample, p, *history[:-1]], levels[i].alpha, levels[i].noise))
    return Table.of(rows)


def _predict(settings: Settings, sample: Vector, outputs: list[Vector], levels: list[Point]) -> Vector:
    """UniP (algorithm 2): outputs newest first, levels oldest first up to the one stepped to."""
    base, scale = _first_order(settings, sample, outputs[0], *levels[-2:])
    if len(outputs) == 1:
        return base
    ratios, matrix, right = _system(settings, levels)
    weights = np.array([0.5]) if len(outputs) == 2 else np.linalg.solve(matrix[:-1, :-1], right[:-1])
    return base - scale * sum(w * (m - outputs[0]) / r for w, m, r in zip(weights, outputs[1:], ratios, strict=True))


def _correct(settings: Settings, sample: Vector, newest: Vector, outputs: list[Vector], levels: list[Point]) -> Vector:
    """UniC (algorithm 1): redo the step that led here, now that the model has said `newest` at its end."""
    base, scale = _first_order(settings, sample, outputs[0], *levels[-2:])
    ratios, matrix, right = _system(settings, levels)
    weights = np.array([0.5]) if len(outputs) == 1 else np.linalg.solve(matrix, right)
    residual = weights[-1] * (newest - outputs[0])
    for w, m, r in zip(weights[:-1], outputs[1:], ratios, strict=True):
        residual = residual + w * (m - outputs[0]) / r
    return base - scale * residual


def _first_order(settings: Settings, sample: Vector, output: Vector, now: Point, then: Point) -> tuple[Vector, float]:
    """The exponential integrator's first order, and the factor of B(h) that scales the higher ones."""
    if settings["predict_x0"]:
        keep, outer, integral = then.noise / now.noise, then.alpha, then.alpha * (then.sigma / now.sigma - 1)
    else:
        keep, outer, integral = then.alpha / now.alpha, then.noise, then.alpha * (now.sigma - then.sigma)
    scale = outer * _signed_step(settings, now, then) if settings["solver_type"] == "bh1" else integral
    return keep * sample - integral * output, scale


def _signed_step(settings: Settings, now: Point, then: Point) -> float:
    h = then.log_snr - now.log_snr
    return -h if settings["predict_x0"] else h


def _system(settings: Settings, levels: list[Point]) -> tuple[list[float], np.ndarray, np.ndarray]:
    """Equation 9: (ratios of the older steps, R, b), R[i] @ weights = b[i]."""
    *older, now, then = levels
    h = then.log_snr - now.log_snr
    ratios = [(level.log_snr - now.log_snr) / h for level in reversed(older)]
    step = _signed_step(settings, now, then)
    b_of_h = step if settings["solver_type"] == "bh1" else math.expm1(step)
    right, phi, factorial = [], math.expm1(step) / step - 1, 1
    for k in range(1, len(ratios) + 2):
        right.append(phi * factorial / b_of_h)
        factorial *= k + 1
        phi = phi / step - 1 / factorial
    return ratios, np.vander([*ratios, 1.0], increasing=True).T, np.array(right)
