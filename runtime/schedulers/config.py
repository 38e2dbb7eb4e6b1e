"""Scheduler configs: diffusers' classes and defaults, our short names, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Settings = Mapping[str, Any]
"""A complete scheduler config: every key its class knows, with a value."""

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
"""Short name → (diffusers class, config overrides). `_karras` or `_exponential` may follow where the class has them."""

SPACINGS: dict[str, dict[str, Any]] = {
    "_karras": {"use_karras_sigmas": True, "use_exponential_sigmas": False, "use_beta_sigmas": False},
    "_exponential": {"use_karras_sigmas": False, "use_exponential_sigmas": True, "use_beta_sigmas": False},
}

_TRAINED = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
            "trained_betas": None, "prediction_type": "epsilon", "steps_offset": 0}
_CLIPPED = {"clip_sample": True, "clip_sample_range": 1.0, "thresholding": False}
_RESCALED = {"rescale_betas_zero_snr": False}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
           "sigma_min": None, "sigma_max": None, "timestep_spacing": "linspace"}
_STABLE = {"beta_start": 0.00085, "beta_end": 0.012}
_LOGSNR = {"solver_order": 2, "thresholding": False, "lower_order_final": True, "final_sigmas_type": "zero",
           "use_flow_sigmas": False, "use_dynamic_shifting": False}

DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": _TRAINED | _CLIPPED | _RESCALED | {"timestep_spacing": "leading", "variance_type": "fixed_small"},
    "DDIMScheduler": _TRAINED | _CLIPPED | _RESCALED | {"timestep_spacing": "leading", "set_alpha_to_one": True},
    "PNDMScheduler": _TRAINED | {"timestep_spacing": "leading", "set_alpha_to_one": False, "skip_prk_steps": False},
    "LMSDiscreteScheduler": _TRAINED | _SIGMAS,
    "EulerDiscreteScheduler": _TRAINED | _RESCALED | _SIGMAS | {
        "interpolation_type": "linear", "timestep_type": "discrete", "final_sigmas_type": "zero"},
    "EulerAncestralDiscreteScheduler": _TRAINED | _RESCALED | {"timestep_spacing": "linspace"},
    "HeunDiscreteScheduler": _TRAINED | _STABLE | _SIGMAS | {"clip_sample": False, "clip_sample_range": 1.0},
    "KDPM2DiscreteScheduler": _TRAINED | _STABLE | _SIGMAS,
    "DPMSolverMultistepScheduler": _TRAINED | _RESCALED | _SIGMAS | _LOGSNR | {
        "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "euler_at_final": False, "use_lu_lambdas": False,
        "lambda_min_clipped": -float("inf"), "variance_type": None},
    "UniPCMultistepScheduler": _TRAINED | _RESCALED | _SIGMAS | _LOGSNR | {
        "predict_x0": True, "solver_type": "bh2", "disable_corrector": (), "solver_p": None, "shift_terminal": None},
    "LCMScheduler": _TRAINED | _CLIPPED | _RESCALED | _STABLE | {
        "beta_schedule": "scaled_linear", "clip_sample": False, "timestep_spacing": "leading", "set_alpha_to_one": True,
        "original_inference_steps": 50, "timestep_scaling": 10.0},
}
"""diffusers class → its config keys and their defaults (diffusers 0.42)."""

_REFUSED = ("thresholding", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas", "use_dynamic_shifting",
            "shift_terminal", "solver_p")

_CHOICES = {
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete", "continuous"),
    "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
    "solver_type": ("midpoint", "heun", "bh1", "bh2", "logrho"),
    "solver_order": (1, 2, 3),
}

_NO_SAMPLE = ("PNDMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler")


def names() -> list[str]:
    """Every short name of a sampler, suffixed ones too, for help texts."""
    return [name + suffix for name in SCHEDULERS for suffix in ("", *SPACINGS) if not suffix or _spaced(name)]


def resolve(config: Mapping[str, Any], scheduler: str | None = None) -> tuple[str, Settings]:
    """A diffusers scheduler_config, optionally under another sampler, as (class name, complete settings).

    config: as diffusers saves it; missing keys take the class's defaults and keys the class does not know are ignored.
    scheduler: a diffusers class name or one of `names()`; the config then carries over as `Class.from_config` does.
    Raises ValueError for an unknown scheduler and for settings that no table can express.
    """
    name, overrides = _find(config, scheduler)
    absent = config.get("_use_default_values", ())
    given = {key: value for key, value in config.items() if key not in absent} | overrides
    settings = {key: given.get(key, default) for key, default in DEFAULTS[name].items()}
    _check(name, settings)
    return name, settings


def _spaced(name: str) -> bool:
    return "use_karras_sigmas" in DEFAULTS[SCHEDULERS[name][0]]


def _find(config: Mapping[str, Any], scheduler: str | None) -> tuple[str, dict[str, Any]]:
    name = config.get("_class_name") if scheduler is None else scheduler
    if name in DEFAULTS:
        return str(name), {}
    if scheduler is not None:
        suffix = next((s for s in SPACINGS if scheduler.endswith(s)), "")
        base = scheduler.removesuffix(suffix)
        if base in SCHEDULERS and suffix and not _spaced(base):
            spaced = ", ".join(known + suffix for known in SCHEDULERS if _spaced(known))
            raise ValueError(f"scheduler: got {scheduler!r}, but {base} has no {suffix[1:]} sigmas, "
                             f"expected one of {spaced}; use {base!r} for its own timesteps")
        if base in SCHEDULERS:
            cls, overrides = SCHEDULERS[base]
            return cls, overrides | SPACINGS.get(suffix, {})
    raise ValueError(f"scheduler: got {name!r}, expected one of {', '.join(names())} or {', '.join(DEFAULTS)}; "
                     "name one of these")


def _check(name: str, settings: Settings) -> None:
    for key in _REFUSED:
        if settings.get(key):
            raise ValueError(f"scheduler config {key}: got {settings[key]!r} for {name}, expected it unset: no linear "
                             "update expresses it here; set it to false or choose another scheduler")
    for key, choices in _CHOICES.items():
        if key in settings and settings[key] not in choices:
            raise ValueError(f"scheduler config {key}: got {settings[key]!r} for {name}, expected one of {choices}; "
                             "change it or choose another scheduler")
    if settings["prediction_type"] == "sample" and name in _NO_SAMPLE:
        raise ValueError(f"scheduler config prediction_type: got 'sample' for {name}, expected 'epsilon' or "
                         "'v_prediction'; choose another scheduler for this model")
    if settings.get("use_karras_sigmas") and settings.get("use_exponential_sigmas"):
        raise ValueError("scheduler config: got both use_karras_sigmas and use_exponential_sigmas, expected at most "
                         "one; set the other to false")
    if name == "DPMSolverMultistepScheduler":
        _check_dpm(settings)


def _check_dpm(settings: Settings) -> None:
    algorithm = settings["algorithm_type"]
    if not algorithm.endswith("++") and settings["final_sigmas_type"] == "zero":
        raise ValueError(f"scheduler config final_sigmas_type: got 'zero' with algorithm_type {algorithm!r}, whose "
                         "last step it makes infinite, expected 'sigma_min'; set that")
    if algorithm == "sde-dpmsolver" and settings["solver_order"] == 3:
        raise ValueError("scheduler config solver_order: got 3 with algorithm_type 'sde-dpmsolver', expected 1 or 2; "
                         "use one of those or 'sde-dpmsolver++'")
