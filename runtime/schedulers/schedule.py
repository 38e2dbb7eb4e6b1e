"""Noise schedules: betas, timesteps and sigmas.

A checkpoint's schedule is the float32 one it was trained and is sampled with, so betas and their cumulative product are
rounded to float32 as the reference rounds them; solver coefficients are then float64 functions of those numbers. This
matters where 1 - alphas_cumprod is small: at t = 0 its float32 rounding alone is 3e-5 of its value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.schedulers.config import Settings

ZERO_SNR_SIGNAL = 2.0**-24
"""alphas_cumprod that stands for none under rescale_betas_zero_snr: sigma stays finite, at 4096."""


@dataclass(frozen=True)
class Levels:
    """Noise levels of a run. timesteps: float64 [n]; sigmas: float64 [n + 1], the last one where the run ends."""

    timesteps: np.ndarray
    sigmas: np.ndarray


def alphas_cumprod(settings: Settings, floor: float = 0.0) -> np.ndarray:
    """The share of signal left in the variance at every training timestep, float32 [num_train_timesteps].

    floor: its last value under rescale_betas_zero_snr (arXiv 2305.08891 §3.1), not zero for solvers that divide by it.
    """
    zero_snr = settings.get("rescale_betas_zero_snr", False)
    betas = _betas(settings)
    if zero_snr:
        betas = _zero_terminal_snr(betas)
    product = _cumprod(np.float32(1) - betas)
    if zero_snr and floor:
        product[-1] = floor
    return product


def trained_signal(settings: Settings) -> np.ndarray:
    """alphas_cumprod that sigma can be taken of, float32 [num_train_timesteps], never zero."""
    return alphas_cumprod(settings, floor=ZERO_SNR_SIGNAL)


def _betas(settings: Settings) -> np.ndarray:
    steps, start, end = settings["num_train_timesteps"], settings["beta_start"], settings["beta_end"]
    if settings["trained_betas"] is not None:
        return np.asarray(settings["trained_betas"], np.float32)
    if settings["beta_schedule"] == "linear":
        return _linspace(start, end, steps)
    if settings["beta_schedule"] == "scaled_linear":
        return _linspace(start**0.5, end**0.5, steps) ** 2

    def signal(t: float) -> float:  # squaredcos_cap_v2, arXiv 2102.09672 eq. 17
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - signal((i + 1) / steps) / signal(i / steps), 0.999) for i in range(steps)], np.float32)


def _linspace(start: float, end: float, steps: int) -> np.ndarray:
    """float32 [steps] from both ends towards the middle with one rounding each, bit for bit what checkpoints use."""
    first, last = np.float32(start), np.float32(end)
    step = float((last - first) / np.float32(max(steps - 1, 1)))
    i = np.arange(steps)
    return np.where(i < steps // 2, float(first) + step * i, float(last) - step * (steps - 1 - i)).astype(np.float32)


def _cumprod(factors: np.ndarray) -> np.ndarray:
    return np.cumprod(factors.astype(np.float64)).astype(np.float32)


def _zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """arXiv 2305.08891 algorithm 1: shift and scale sqrt(alphas_cumprod) so that it ends in 0."""
    root = np.sqrt(_cumprod(np.float32(1) - betas))
    first, last = root[0], root[-1]
    bar = ((root - last) * (first / (first - last))) ** 2
    return np.float32(1) - np.concatenate([bar[:1], bar[1:] / bar[:-1]])


def whole_timesteps(settings: Settings, steps: int, *, beyond: int = 0, last: int | None = None) -> np.ndarray:
    """Descending integer timesteps, int64 [steps], by the config's timestep_spacing and steps_offset.

    beyond: 1 for the solvers that space steps + 1 points and drop the smallest. last: one more than the largest usable
    timestep, num_train_timesteps where None.
    """
    trained = settings["num_train_timesteps"]
    last = trained if last is None else last
    if settings["timestep_spacing"] == "linspace":
        return np.linspace(0, last - 1, steps + beyond).round()[::-1][:steps].astype(np.int64)
    if settings["timestep_spacing"] == "leading":
        ascending = np.arange(steps + beyond) * (last // (steps + beyond))
        return ascending[::-1][:steps].astype(np.int64) + settings["steps_offset"]
    # arange may end in a rounding error above 0, one timestep too many; diffusers keeps it, as timestep -1.
    return np.arange(last, 0, -trained / steps)[:steps].round().astype(np.int64) - 1


def sigma_timesteps(settings: Settings, steps: int) -> np.ndarray:
    """Descending timesteps of the sigma solvers, float32 [steps]; those of linspace are not whole numbers."""
    if settings["timestep_spacing"] == "linspace":
        return np.linspace(0, settings["num_train_timesteps"] - 1, steps, dtype=np.float32)[::-1]
    return whole_timesteps(settings, steps).astype(np.float32)


def check_range(timesteps: np.ndarray, settings: Settings) -> np.ndarray:
    """Integer timesteps as given. Raises ValueError where one of them was never trained."""
    trained = settings["num_train_timesteps"]
    if timesteps.min() < 0 or timesteps.max() >= trained:
        raise ValueError(f"timesteps: got {timesteps.min()} … {timesteps.max()}, expected 0 … {trained - 1}; use fewer "
                         "steps or another timestep_spacing or steps_offset")
    return timesteps


def descending(timesteps: Sequence[float], settings: Settings) -> np.ndarray:
    """A caller's integer timesteps, int64 [n]. Raises ValueError unless they descend within the trained range."""
    array = check_range(np.array(timesteps, np.int64), settings)
    if (np.diff(array) >= 0).any():
        raise ValueError(f"timesteps: got {list(timesteps)}, expected descending numbers; sort them and drop repeats")
    return array


def training_sigmas(signal: np.ndarray) -> np.ndarray:
    """Noise over signal at every training timestep, float32, from alphas_cumprod."""
    return np.sqrt((1 - signal) / signal)


def levels_at(timesteps: np.ndarray, signal: np.ndarray, last: float = 0.0) -> Levels:
    """Levels at given timesteps, sigmas interpolated between training timesteps and rounded to float32."""
    sigmas = training_sigmas(signal)
    inner = np.interp(timesteps, np.arange(len(sigmas)), sigmas)
    return Levels(timesteps.astype(np.float64), _rounded(inner, last))


def respaced(settings: Settings, signal: np.ndarray, largest: float, smallest: float, steps: int,
             last: float | None = 0.0) -> Levels:
    """Levels with Karras (EDM, arXiv 2206.00364 eq. 5, rho 7) or exponential sigmas and the timesteps they fall on.

    largest, smallest: sigmas of the ends where the config has no sigma_max and sigma_min. last: where the run ends,
    None for the smallest sigma.
    """
    largest = largest if settings["sigma_max"] is None else settings["sigma_max"]
    smallest = smallest if settings["sigma_min"] is None else settings["sigma_min"]
    if settings["use_karras_sigmas"]:
        ends = largest ** (1 / 7), smallest ** (1 / 7)
        sigmas = (ends[0] + np.linspace(0, 1, steps) * (ends[1] - ends[0])) ** 7
    else:
        sigmas = np.exp(np.linspace(math.log(largest), math.log(smallest), steps))
    return Levels(timestep_of(sigmas, signal), _rounded(sigmas, float(sigmas[-1]) if last is None else last))


def timestep_of(sigmas: np.ndarray, signal: np.ndarray) -> np.ndarray:
    """Fractional training timestep of each sigma, by linear interpolation of log sigma; float64."""
    trained = np.log(training_sigmas(signal))
    wanted = np.log(np.maximum(sigmas, 1e-10))
    above = np.cumsum(wanted - trained[:, None] >= 0, axis=0)
    low = above.argmax(axis=0).clip(max=len(trained) - 2)
    share = np.clip((trained[low] - wanted) / (trained[low] - trained[low + 1]), 0, 1)
    return ((1 - share) * low + share * (low + 1)).astype(np.float64)


def wants_respacing(settings: Settings) -> bool:
    """Return whether the config asks for Karras or exponential sigmas."""
    return bool(settings.get("use_karras_sigmas") or settings.get("use_exponential_sigmas"))


def _rounded(sigmas: np.ndarray, last: float) -> np.ndarray:
    return np.append(sigmas, last).astype(np.float32).astype(np.float64)
