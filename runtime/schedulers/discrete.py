"""Samplers on training timesteps that remember nothing: DDPM, DDIM and LCM."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from runtime.schedulers.config import Settings
from runtime.schedulers.predict import noise_from, x0_from
from runtime.schedulers.schedule import alphas_cumprod, check_range, descending, whole_timesteps
from runtime.schedulers.table import Row, Table, Vector, columns

NO_NOISE_VARIANCE = 1e-20
"""Variance of DDPM's step to a clean sample: its noise is drawn and scaled by 1e-10, as diffusers does."""


def ddpm(settings: Settings, steps: int | None, timesteps: Sequence[float] | None, start: int) -> Table:
    """Ancestral sampling, arXiv 2006.11239 eq. 7 with the variances of §3.2, between any two timesteps."""
    x, p, _, noise, _ = columns(0)
    signal = alphas_cumprod(settings).astype(np.float64)
    times = _timesteps(settings, steps, timesteps)
    rows = []
    for t, following in list(pairwise([*times, -1]))[start:]:
        now, then = signal[t], signal[following] if following >= 0 else 1.0
        beta = 1 - now / then
        mean = then**0.5 * beta / (1 - now) * p + (now / then) ** 0.5 * (1 - then) / (1 - now) * x
        variance = max((1 - then) / (1 - now) * beta, NO_NOISE_VARIANCE)
        deviation = (beta if settings["variance_type"] == "fixed_large" else variance) ** 0.5
        rows.append(_row(settings, t, now, mean + deviation * noise if t > 0 else mean, draws=t > 0))
    return Table.of(rows)


def ddim(settings: Settings, steps: int, start: int, eta: float) -> Table:
    """arXiv 2010.02502 eq. 12 and 16; noise is drawn at every step where eta > 0."""
    x, p, _, noise, m = columns(0)
    signal = alphas_cumprod(settings).astype(np.float64)
    final = 1.0 if settings["set_alpha_to_one"] else signal[0]
    rows = []
    for t in _timesteps(settings, steps, None)[start:]:
        following = t - settings["num_train_timesteps"] // steps
        now, then = signal[t], signal[following] if following >= 0 else final
        deviation = eta * ((1 - then) / (1 - now) * (1 - now / then)) ** 0.5
        # The noise comes from m itself: it stays what the model said where p is clamped.
        of_x, of_m = noise_from(settings["prediction_type"], now**0.5, (1 - now)**0.5)
        direction = (1 - then - deviation**2) ** 0.5
        update = then**0.5 * p + direction * (of_x * x + of_m * m) + deviation * noise
        rows.append(_row(settings, t, now, update, draws=eta > 0))
    return Table.of(rows)


def ddim_inversion(settings: Settings, steps: int) -> Table:
    """DDIM run backwards, from a clean sample to the noise that it comes from (arXiv 2010.02502 §4.3).

    The timesteps of `ddim`, ascending: each takes the sample from the level of the one before to its own.
    """
    x, _, _, _, m = columns(0)
    signal = alphas_cumprod(settings).astype(np.float64)
    before = 1.0 if settings["set_alpha_to_one"] else signal[0]
    rows = []
    for t in _timesteps(settings, steps, None)[::-1]:
        alpha, sigma = before**0.5, (1 - before)**0.5
        if sigma == 0 and settings["prediction_type"] == "sample":
            raise ValueError("scheduler config set_alpha_to_one: got true with prediction_type 'sample', which says "
                             "nothing of the noise in a clean sample, expected false; change either")
        of_x, of_m = noise_from(settings["prediction_type"], alpha, sigma)
        noise = of_x * x + of_m * m
        update = signal[t]**0.5 * (x - sigma * noise) / alpha + (1 - signal[t])**0.5 * noise
        rows.append(Row(t, (0.0, 0.0), [update], alpha, sigma))
        before = signal[t]
    return Table.of(rows)


def lcm(settings: Settings, steps: int | None, timesteps: Sequence[float] | None, start: int) -> Table:
    """Multistep consistency sampling, arXiv 2310.04378 algorithm 3, with the boundary scalings of its §4.1."""
    x, p, _, noise, _ = columns(0)
    signal = alphas_cumprod(settings).astype(np.float64)
    times = descending(timesteps, settings) if timesteps is not None else _distilled(settings, steps or 0)
    rows = []
    for t, following in list(pairwise([*times, -1]))[start:]:
        now = signal[t]
        scaled = t * settings["timestep_scaling"]
        keep, change = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
        clean = change * p + keep * x
        draws = following >= 0
        update = signal[following]**0.5 * clean + (1 - signal[following])**0.5 * noise if draws else clean
        rows.append(_row(settings, t, now, update, draws=draws))
    return Table.of(rows)


def _timesteps(settings: Settings, steps: int | None, timesteps: Sequence[float] | None) -> np.ndarray:
    if timesteps is not None:
        return descending(timesteps, settings)
    if steps is None or steps > settings["num_train_timesteps"]:
        raise ValueError(f"steps: got {steps}, expected at most the {settings['num_train_timesteps']} training "
                         "timesteps; use fewer")
    return check_range(whole_timesteps(settings, steps), settings)


def _distilled(settings: Settings, steps: int) -> np.ndarray:
    original, trained = settings["original_inference_steps"], settings["num_train_timesteps"]
    if not steps <= original <= trained:
        raise ValueError(f"steps: got {steps} with original_inference_steps {original}, expected at most that, and "
                         f"that at most {trained}; LCM picks its timesteps among those it was trained on: use fewer")
    origin = np.arange(original, 0, -1) * (trained // original) - 1
    return origin[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(np.int64)]


def _row(settings: Settings, t: int, signal: float, update: Vector, *, draws: bool) -> Row:
    """A row whose p is the predicted x0, clamped where the config says so."""
    if signal == 0 and settings["prediction_type"] == "epsilon":
        raise ValueError(f"scheduler config rescale_betas_zero_snr: got a timestep {t} of pure noise with "
                         "prediction_type 'epsilon', which then says nothing of the picture, expected 'v_prediction'; "
                         "change either")
    alpha, sigma = signal**0.5, (1 - signal)**0.5
    clip = settings["clip_sample_range"] if settings["clip_sample"] else 0.0
    return Row(t, x0_from(settings["prediction_type"], alpha, sigma), [update], alpha, sigma, clip=clip, draws=draws)
