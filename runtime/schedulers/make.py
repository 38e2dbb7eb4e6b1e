"""A scheduler config becomes a sampler table here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from runtime.schedulers.config import Settings, resolve
from runtime.schedulers.discrete import ddim, ddim_inversion, ddpm, lcm
from runtime.schedulers.dpm import dpm
from runtime.schedulers.pndm import pndm
from runtime.schedulers.schedule import alphas_cumprod
from runtime.schedulers.sigma import dpm2, euler, euler_ancestral, heun, lms
from runtime.schedulers.table import Table
from runtime.schedulers.unipc import unipc

_SOLVERS: dict[str, Callable[[Settings, int, int], Table]] = {
    "PNDMScheduler": pndm,
    "LMSDiscreteScheduler": lms,
    "EulerAncestralDiscreteScheduler": euler_ancestral,
    "KDPM2DiscreteScheduler": dpm2,
    "UniPCMultistepScheduler": unipc,
}

_SOLVERS_AT_TIMESTEPS: dict[str, Callable[[Settings, int | None, Sequence[float] | None, int], Table]] = {
    "DDPMScheduler": ddpm,
    "EulerDiscreteScheduler": euler,
    "HeunDiscreteScheduler": heun,
    "DPMSolverMultistepScheduler": dpm,
    "LCMScheduler": lcm,
}


def make_table(config: Mapping[str, Any], steps: int | None, *, scheduler: str | None = None, eta: float = 0.0,
               timesteps: Sequence[float] | None = None, start: int = 0) -> Table:
    """The table that gives what diffusers' scheduler class gives, float64.

    config: a diffusers scheduler_config with `_class_name`; missing keys take the class's defaults. steps: solver
    steps, None with `timesteps`. scheduler: another diffusers class or one of `names()`, to which the config carries
    over. eta: DDIM's share of noise. timesteps: the solver's own timesteps, descending, where its diffusers class takes
    them. start: rows skipped by image to image; solvers with memory begin there without any, so this is not a slice.
    Raises ValueError for a scheduler, a setting or an argument that diffusers or a table cannot do.
    """
    name, settings = resolve(config, scheduler)
    _check(name, steps, eta, timesteps, start)
    # Infinite log SNR of a clean sample is part of the formulas; a table that is not finite is refused.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return _solve(name, settings, steps, eta, timesteps, start)


def inversion_table(config: Mapping[str, Any], steps: int) -> Table:
    """The table that finds the noise of a clean sample: that from which DDIM in as many steps comes back to it.

    config, steps: as of `make_table`; the schedule is the config's, whatever its solver. Raises ValueError likewise.
    """
    return ddim_inversion(resolve(config, "ddim")[1], steps)


def signal_and_sigma(config: Mapping[str, Any], timestep: int) -> tuple[float, float]:
    """The forward process of a schedule at one timestep: x = signal · x0 + sigma · noise.

    Raises ValueError for a timestep that it does not have.
    """
    _, settings = resolve(config, None)
    share = alphas_cumprod(settings)
    if not 0 <= timestep < len(share):
        raise ValueError(f"timestep: got {timestep}, expected 0 to {len(share) - 1}")
    return float(share[timestep]) ** 0.5, (1 - float(share[timestep])) ** 0.5


def _solve(name: str, settings: Settings, steps: int | None, eta: float, timesteps: Sequence[float] | None,
           start: int) -> Table:
    try:
        if name in _SOLVERS_AT_TIMESTEPS:
            return _SOLVERS_AT_TIMESTEPS[name](settings, steps, timesteps, start)
        if name == "DDIMScheduler":
            return ddim(settings, steps or 0, start, eta)
        return _SOLVERS[name](settings, steps or 0, start)
    except (ZeroDivisionError, OverflowError, np.linalg.LinAlgError) as e:
        raise ValueError(f"{name}: got {steps} steps, for which two noise levels coincide or the last one is "
                         "infinitely far, expected distinct levels; use fewer steps, or final_sigmas_type, "
                         "lower_order_final and timestep_spacing that fit together") from e


def _check(name: str, steps: int | None, eta: float, timesteps: Sequence[float] | None, start: int) -> None:
    if timesteps is not None:
        if steps is not None:
            raise ValueError(f"timesteps: got a list and steps {steps}, expected one of the two; pass steps=None")
        if name not in _SOLVERS_AT_TIMESTEPS:
            raise ValueError(f"timesteps: got a list for {name}, expected steps; only "
                             f"{', '.join(_SOLVERS_AT_TIMESTEPS)} take a list")
        if len(timesteps) == 0 or not all(isinstance(t, int | float | np.number) for t in timesteps):
            raise ValueError(f"timesteps: got {timesteps!r}, expected at least one number; pass a descending list")
    elif not _whole(steps) or steps is None or steps < 1:
        raise ValueError(f"steps: got {steps!r}, expected a whole number of at least 1; pass how many steps to take")
    if not _whole(start) or start < 0:
        raise ValueError(f"start: got {start!r}, expected a whole number of rows to skip; pass 0 for the whole run")
    if isinstance(eta, bool) or not isinstance(eta, int | float) or not 0 <= eta < float("inf"):
        raise ValueError(f"eta: got {eta!r}, expected a finite number of at least 0; 0 draws no noise, 1 as DDPM")
    if eta and name != "DDIMScheduler":
        raise ValueError(f"eta: got {eta} for {name}, expected 0: only DDIMScheduler has it; drop it or use ddim")


def _whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
