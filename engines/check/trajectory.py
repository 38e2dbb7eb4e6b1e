"""A whole denoising by an engine beside the reference: does its error grow from step to step?

Each denoises the same seeded latents with its own predictions, by deterministic DDIM with classifier-free guidance, and
the reference decodes both results. Engines cannot import the runtime and its samplers; what a comparison needs of one
is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import engines
from engines import store
from engines.backend import Engine, Target
from engines.bundle import Bundle, Manifest
from engines.check import verify
from engines.check.verify import Difference, difference
from engines.spec import EngineConfig, EngineError

UNET, BODY, DECODER = "unet", "unet_body", "vae_decoder"
STEPS, GUIDANCE = 20, 7.5
PICTURE_MAX = 1e-3
"""Largest difference of full scale that the picture of an fp32 engine may have."""
LEAST_PSNR = 35.0
"""Least PSNR, in dB of full scale, that the picture of a 16-bit engine must have."""

Predict = Callable[[np.ndarray, int], np.ndarray]
"""Latents [1, C, h, w] and a step → the UNet's outputs [2, C, h, w], without the prompt and with it; float32."""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Schedule:
    """timesteps: descending, [steps]. signal: alphas_cumprod there and, last, where the run ends, [steps + 1]."""

    timesteps: tuple[int, ...]
    signal: tuple[float, ...]


@dataclass(frozen=True)
class Trajectory:
    """One engine's denoising against the reference's: the latents after every step, and the picture they end in."""

    engine: str
    config: EngineConfig
    latents: tuple[Difference, ...]
    picture: Difference

    @property
    def broken_at(self) -> int | None:
        """The first step, counted from 1, whose latents have NaN or Inf."""
        return next((n for n, step in enumerate(self.latents, 1) if not step.finite), None)

    @property
    def fault(self) -> str | None:
        """What is wrong with it, or None: the picture must be as near as the engine's dtype has to be."""
        if self.picture.reference_nan or self.picture.reference_inf:
            return "the reference has NaN or Inf: the exported graph is wrong; export the checkpoint again"
        if self.broken_at or not self.picture.finite:
            return f"NaN or Inf from {f'step {self.broken_at}' if self.broken_at else 'the decoder'} on"
        if self.config.dtype == "fp32":
            near = self.picture.max_abs <= PICTURE_MAX
            return None if near else f"got {self.picture.max_abs:.1e} of full scale, expected at most {PICTURE_MAX:.0e}"
        near = self.picture.psnr >= LEAST_PSNR
        return None if near else f"got {self.picture.psnr:.1f} dB, expected at least {LEAST_PSNR:.0f}; use --dtype fp32"

    def to_json(self) -> dict[str, Any]:
        return {"name": self.engine, "steps": [d.to_json() for d in self.latents], "picture": self.picture.to_json(),
                "not_finite_from_step": self.broken_at, "error": self.fault}


def compare(bundle: Bundle, found: Mapping[Path, store.Record], *, steps: int = STEPS, guidance: float = GUIDANCE,
            seed: int = verify.SEED, progress: bool = True) -> list[Trajectory]:
    """Denoise with each engine of the UNet in `found` (directory → record) and with the reference at its size.

    An engine of the UNet's body gets the rest from those of its parts, which are built where they are not there.
    Returns one trajectory an engine. Raises EngineError for a model whose schedule has no betas, or an engine that
    cannot be opened.
    """
    from tqdm import tqdm

    plan = schedule(bundle.manifest, steps)
    sizes: dict[tuple[int, ...], list[Path]] = {}
    for path, record in found.items():
        sizes.setdefault(_pixels(bundle, record.config), []).append(path)
    trajectories = []
    with tqdm(total=(len(sizes) + len(found)) * steps, unit="step", disable=None if progress else True) as bar:
        for paths in sizes.values():
            trajectories += _of_one_size(bundle, {path: found[path] for path in paths}, plan, guidance, seed, bar)
    return trajectories


def _of_one_size(bundle: Bundle, found: Mapping[Path, store.Record], plan: Schedule, guidance: float, seed: int,
                 bar: Any) -> list[Trajectory]:
    latent, (height, width) = bundle.manifest.latent, _pixels(bundle, next(iter(found.values())).config)
    own = bundle.config(UNET, backend="onnxruntime", size=(height, width), batch=2)
    text, time = _conditions(bundle, own, seed), {"timestep": np.array(plan.timesteps, np.float32)}
    shape = 1, latent.channels, own.dims["latent_height"], own.dims["latent_width"]
    start = np.random.default_rng(seed).standard_normal(shape)
    runs: dict[Path | None, list[np.ndarray]] = {}

    def denoised(engine: Engine, name: str, text: Arrays, time: Arrays) -> list[np.ndarray]:
        bar.set_description(name)
        latents = []
        for x in denoise(predictor(engine, text, time), start.astype(np.float32), plan, guidance,
                         bundle.manifest.prediction_type):
            latents.append(x)
            bar.update()
        return latents

    with verify.open_reference(Target.of(bundle, UNET, own)) as engine:
        runs[None] = denoised(engine, "reference", text, time)
    del engine  # one at a time: each has a copy of the weights
    for path, record in found.items():
        module = engines.backend(record.config.backend)
        given = _from_parts(bundle, record.config, text, time) if record.component == BODY else (text, time)
        runs[path] = denoised(module.load(Target.of(bundle, record.component, record.config), path), path.name,
                              *given)
    bar.set_description("decode")
    pictures = _decode(bundle, height, width, {path: latents[-1] for path, latents in runs.items()})
    truth = runs[None]
    return [Trajectory(path.name, record.config,
                       tuple(difference(x, y) for x, y in zip(runs[path], truth, strict=True)),
                       difference(pictures[path], pictures[None], peak=1.0)) for path, record in found.items()]


def schedule(manifest: Manifest, steps: int) -> Schedule:
    """`steps` timesteps of the model's own noise schedule, evenly spaced ("leading"), the last one not below 1.

    Raises EngineError for a scheduler that is not made of betas, and for more steps than it was trained with.
    """
    config = manifest.scheduler
    trained, kind = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
    first, last = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], np.float64)
    elif kind == "linear":
        betas = np.linspace(first, last, trained)
    elif kind == "scaled_linear":
        betas = np.linspace(first**0.5, last**0.5, trained) ** 2
    else:
        raise EngineError(f"trajectory: got beta_schedule {kind!r}, expected linear or scaled_linear; compare whole "
                          "pictures instead: python -m runtime BUNDLE PROMPT --seed 0 --backend NAME")
    if steps >= trained:
        raise EngineError(f"trajectory: got {steps} steps, expected fewer than the {trained} it was trained with")
    betas = betas.astype(np.float32)  # as checkpoints were trained; near t = 0 the rounding matters
    signal = np.cumprod((1 - betas).astype(np.float64)).astype(np.float32)
    timesteps = (np.arange(steps) * (trained // steps))[::-1] + 1
    return Schedule(tuple(int(t) for t in timesteps), (*(float(signal[t]) for t in timesteps), float(signal[0])))


def denoise(predict: Predict, latents: np.ndarray, plan: Schedule, guidance: float,
            prediction_type: str) -> Iterator[np.ndarray]:
    """The latents after every step, float32 of the shape of `latents`, [1, C, h, w]."""
    for step, (signal, following) in enumerate(pairwise(plan.signal)):
        uncond, cond = predict(latents, step)
        latents = ddim(latents, uncond + guidance * (cond - uncond), signal, following, prediction_type)
        yield latents


def ddim(x: np.ndarray, m: np.ndarray, signal: float, following: float, prediction_type: str) -> np.ndarray:
    """One step of DDIM without noise (arXiv 2010.02502 eq. 12, σ = 0) from one share of signal to the next; float32.

    x_next = √ā_next · x0 + √(1 − ā_next) · ε, where the model's output m is ε, x0 or v = √ā · ε − √(1 − ā) · x0 (arXiv
    2202.00512 appendix D), and x = √ā · x0 + √(1 − ā) · ε.
    """
    a, b = signal**0.5, (1 - signal) ** 0.5
    if prediction_type == "v_prediction":
        clean, noise = a * x - b * m, a * m + b * x
    elif prediction_type == "epsilon":
        clean, noise = (x - b * m) / a, m
    elif prediction_type == "sample":
        clean, noise = m, (x - a * m) / b
    else:
        raise EngineError(f"trajectory: got prediction type {prediction_type!r}, expected epsilon, v_prediction or "
                          "sample")
    return (following**0.5 * clean + (1 - following) ** 0.5 * noise).astype(np.float32)


def predictor(engine: Engine, text: Arrays, time: Arrays) -> Predict:
    """A UNet engine of any static batch as a function of latents and step.

    text: its inputs that stay, two rows each. time: those that depend on the timestep, one row a step. Channels of the
    sample after the latent ones (a mask, say) are zero.
    """
    channels = int(engine.inputs["sample"].shape[1])

    def predict(latents: np.ndarray, step: int) -> np.ndarray:
        sample = np.zeros((2, channels, *latents.shape[2:]), np.float32)
        sample[:, :latents.shape[1]] = latents
        given = {**text, **{name: value[[step, step]] for name, value in time.items()}, "sample": sample}
        prediction, = in_rows(engine, {name: given[name] for name in engine.inputs}).values()
        return prediction

    return predict


def in_rows(engine: Engine, feed: Mapping[str, np.ndarray]) -> Arrays:
    """Outputs of an engine for inputs of any number of rows: in turn where it has fewer, some repeated to fill it."""
    rows = int(next(iter(engine.inputs.values())).shape[0])
    count = len(next(iter(feed.values())))
    runs = [verify.run(engine, {name: np.resize(value[first:first + rows], (rows, *value.shape[1:]))
                                for name, value in feed.items()}) for first in range(0, count, rows)]
    return {name: np.concatenate([run[name] for run in runs])[:count] for name in runs[0]}


def _from_parts(bundle: Bundle, config: EngineConfig, text: Arrays, time: Arrays) -> tuple[Arrays, Arrays]:
    """`text` and `time`, and what the engines of the UNet's parts of this config's kind make of them for its body."""
    text, time = dict(text), dict(time)
    for name in bundle.manifest.components:
        if bundle.component(name).part in ("text", "time") and bundle.component(name).network == UNET:
            _, own = store.plan(bundle, config.backend, sizes=[_pixels(bundle, config)], dtype=config.dtype,
                                components=[name], device=config.device, threads=config.threads,
                                options=config.options)[-1]
            engine = store.load(bundle, name, own)
            given = time if "timestep" in engine.inputs else text
            given |= in_rows(engine, {one: given[one] for one in engine.inputs})
    return text, time


def _conditions(bundle: Bundle, config: EngineConfig, seed: int) -> dict[str, np.ndarray]:
    """The UNet's inputs beside sample and timestep, two rows of each.

    Text states are those of the reference's text encoder for seeded tokens; what it does not give is standard normal.
    """
    specs = {s.name: s.resolve(config.dims) for s in bundle.component(UNET).inputs}
    feed = verify.inputs([spec for name, spec in specs.items() if name not in ("sample", "timestep")], seed)
    text = bundle.manifest.text[0].component
    own = bundle.config(text, backend="onnxruntime", batch=2)
    tokens = verify.inputs([s.resolve(own.dims) for s in bundle.component(text).inputs], seed)
    states = {value.shape: value for value in verify.reference(bundle, text, own, tokens).values()}
    return {name: states.get(value.shape, value) for name, value in feed.items()}


def _decode(bundle: Bundle, height: int, width: int,
            latents: Mapping[Path | None, np.ndarray]) -> dict[Path | None, np.ndarray]:
    """Pictures [1, 3, height, width] in [0, 1] by the reference decoder."""
    config = bundle.config(DECODER, backend="onnxruntime", size=(height, width), batch=1)
    with verify.open_reference(Target.of(bundle, DECODER, config)) as engine:
        return {path: np.clip(verify.run(engine, {"latents": x})["image"] / 2 + 0.5, 0, 1)
                for path, x in latents.items()}


def _pixels(bundle: Bundle, config: EngineConfig) -> tuple[int, int]:
    size = bundle.picture_size(config)
    assert size
    return size
