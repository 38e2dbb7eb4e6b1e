"""Noise levels as solvers in log SNR see them: DPM-Solver and UniPC."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from runtime.schedulers.config import Settings
from runtime.schedulers.schedule import Levels, levels_at, respaced, training_sigmas, wants_respacing


@dataclass(frozen=True)
class Point:
    """A level is one noise level: x = alpha * x0 + noise * randn, alpha**2 + noise**2 = 1."""

    sigma: float

    @property
    def alpha(self) -> float:
        return 1 / math.hypot(self.sigma, 1)

    @property
    def noise(self) -> float:
        return self.sigma * self.alpha

    @property
    def log_snr(self) -> float:
        """log(alpha / noise), infinite for a clean sample."""
        return -math.log(self.sigma) if self.sigma > 0 else math.inf


def points(levels: Levels) -> list[Point]:
    """The n + 1 noise levels of a run of n steps."""
    return [Point(float(sigma)) for sigma in levels.sigmas]


def log_snr_levels(settings: Settings, signal: np.ndarray, timesteps: np.ndarray, steps: int | None, *, rounded: bool,
                   ends_at_smallest: bool = False) -> Levels:
    """Levels at integer timesteps, or respaced between the ends of training.

    steps: None where the caller chose the timesteps. rounded: Karras timesteps go to the nearest integer, others are
    truncated. ends_at_smallest: final_sigmas_type "sigma_min" of a respaced run means its own smallest sigma.
    """
    sigmas = training_sigmas(signal)
    clean = settings["final_sigmas_type"] == "zero"
    last = 0.0 if clean else float(sigmas[0])
    if not wants_respacing(settings):
        return levels_at(timesteps, signal, last)
    if steps is None:
        raise ValueError("timesteps: got a list with Karras or exponential sigmas, which choose the timesteps "
                         "themselves, expected one or the other; drop the list or the sigmas")
    levels = respaced(settings, signal, float(sigmas[-1]), float(sigmas[0]), steps,
                      None if ends_at_smallest and not clean else last)
    times = levels.timesteps.round() if rounded and settings["use_karras_sigmas"] else levels.timesteps
    return Levels(np.trunc(times), levels.sigmas)
