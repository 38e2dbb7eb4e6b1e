"""A whole denoising by an engine beside the reference's: does its error grow from step to step?

Each denoises the same seeded latents with its own predictions, by a sampler table of the runtime with its guidance and
its step, and the reference decodes both results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import engines
from engines import Bundle, Engine, EngineConfig, EngineError, Target, store
from engines.bundle import Component
from engines.check.compare import SEED, Difference, difference, inputs, open_reference, reference, run
from kernels.host.step import advance, guide, initial_state
from runtime.schedulers import Table

PICTURE_MAX = 1e-3
"""Largest difference of full scale that the picture of an fp32 engine may have."""
LEAST_PSNR = 35.0
"""Least PSNR, in dB of full scale, that the picture of a 16-bit engine must have."""

Predict = Callable[[np.ndarray, int], np.ndarray]
"""Model input [C, h, w] and a row of the table → the denoiser's outputs [2, C, h, w], without the conditions and with
them; float32."""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Trajectory:
    """A trajectory compares an engine's denoising with the reference's: latents after every step, and the picture."""

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
        """The reason why the engine is not as near as its dtype has to be, or None."""
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
        """Return the figures as JSON values."""
        return {"name": self.engine, "steps": [d.to_json() for d in self.latents], "picture": self.picture.to_json(),
                "not_finite_from_step": self.broken_at, "error": self.fault}


def trajectories(bundle: Bundle, records: Mapping[Path, store.Record], table: Table, guidance: float,
                 seed: int = SEED) -> list[Trajectory]:
    """Denoise with each of the denoiser's engines (directory → record) and with the reference at its size.

    An engine of the denoiser's body gets the rest from the engines of the other parts, which are built where they are
    missing. Returns one trajectory an engine. Raises EngineError for a form of guidance other than classifier-free, or
    an engine that cannot be opened.
    """
    if (form := bundle.manifest.guidance.form) != "classifier-free":
        raise EngineError(f"trajectory: got a model with guidance {form!r}, expected 'classifier-free'; compare whole "
                          "pictures instead: python -m runtime BUNDLE PROMPT --seed 0 --backend NAME")
    by_size: dict[tuple[int, int] | None, dict[Path, store.Record]] = {}
    for path, record in records.items():
        by_size.setdefault(bundle.picture_size(record.config), {})[path] = record
    found = []
    with tqdm(total=(len(by_size) + len(records)) * table.rows, unit="step", disable=None) as bar:
        for size, of_size in by_size.items():
            found += _at_size(bundle, size, of_size, table, guidance, seed, bar)
    return found


def _at_size(bundle: Bundle, size: tuple[int, int] | None, records: Mapping[Path, store.Record], table: Table,
             guidance: float, seed: int, bar: tqdm) -> list[Trajectory]:
    whole, component = bundle.graph(bundle.denoiser)
    config = bundle.config(whole, backend="onnxruntime", size=size, batch=2)
    text = _conditions(bundle, component, config, seed)
    time = {"timestep": table.timesteps.astype(np.float32)}
    _, *area = next(spec.resolve(config.dims).shape for spec in component.outputs)[-3:]
    start = np.random.default_rng(seed).standard_normal((bundle.manifest.latent.channels, *map(int, area)), np.float32)

    def denoised(engine: Engine, name: str, text: Arrays, time: Arrays) -> list[np.ndarray]:
        bar.set_description(name)
        latents = []
        for x in denoise(predictor(engine, text, time), start, table, guidance, seed):
            latents.append(x)
            bar.update()
        return latents

    with open_reference(Target.of(bundle, whole, config)) as engine:
        truth = denoised(engine, "reference", text, time)
    del engine  # one at a time: each has a copy of the weights
    runs: dict[Path, list[np.ndarray]] = {}
    for path, record in records.items():
        parts = bundle.component(record.component).part == "body"
        given = _from_parts(bundle, record.config, size, text, time) if parts else (text, time)
        target = Target.of(bundle, record.component, record.config)
        runs[path] = denoised(engines.backend(record.config.backend).load(target, path), path.name, *given)
    bar.set_description("decode")
    picture, *pictures = decode(bundle, size, [truth[-1], *(latents[-1] for latents in runs.values())])
    return [Trajectory(path.name, records[path].config,
                       tuple(difference(x, y) for x, y in zip(runs[path], truth, strict=True)),
                       difference(drawn, picture, peak=1.0))
            for path, drawn in zip(runs, pictures, strict=True)]


def denoise(predict: Predict, start: np.ndarray, table: Table, guidance: float, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield the latents after every row of the table, float32 [C, h, w].

    start: unit-variance noise, float32 [C, h, w]. seed: that of the noise which some rows add.
    """
    state = initial_state(table, start)
    for i in range(table.rows):
        uncond, cond = predict(state[0] * np.float32(table.input_scale[i]), i)
        noise = np.random.default_rng((seed, i)).standard_normal(start.shape, np.float32) if table.draws[i] else None
        advance(state, guide(uncond, cond, guidance), noise, table, i)
        yield state[0].copy()


def predictor(engine: Engine, text: Arrays, time: Arrays) -> Predict:
    """Return a denoiser's engine of any static batch as a function of the model input and a row of the table.

    text: its inputs that stay, two rows each. time: those that depend on the timestep, one row for each of the table.
    Channels of the sample after the latent ones (a mask, say) are zero.
    """
    channels = int(engine.inputs["sample"].shape[1])

    def predict(latents: np.ndarray, row: int) -> np.ndarray:
        sample = np.zeros((2, channels, *latents.shape[1:]), np.float32)
        sample[:, :len(latents)] = latents
        feed = {**text, **{name: values[[row, row]] for name, values in time.items()}, "sample": sample}
        prediction, = in_rows(engine, {name: feed[name] for name in engine.inputs}).values()
        return prediction

    return predict


def in_rows(engine: Engine, feed: Mapping[str, np.ndarray]) -> Arrays:
    """Return an engine's outputs for inputs of any number of rows: in turn where it has fewer, repeated to fill it."""
    rows = int(next(iter(engine.inputs.values())).shape[0])
    count = len(next(iter(feed.values())))
    runs = [run(engine, {name: np.resize(value[first:first + rows], (rows, *value.shape[1:]))
                                for name, value in feed.items()}) for first in range(0, count, rows)]
    return {name: np.concatenate([outputs[name] for outputs in runs])[:count] for name in runs[0]}


def decode(bundle: Bundle, size: tuple[int, int] | None, latents: list[np.ndarray]) -> list[np.ndarray]:
    """Return pictures [3, H, W] in [0, 1] of latents [C, h, w] by the reference decoder; without one as they are."""
    if not (decoders := bundle.of_role("first_stage_decoder")):
        return [np.clip(x / 2 + 0.5, 0, 1) for x in latents]
    name, component = bundle.graph(decoders[0])
    given, image = component.inputs[0].name, component.outputs[0].name
    config = bundle.config(name, backend="onnxruntime", size=size, batch=1)
    with open_reference(Target.of(bundle, name, config)) as engine:
        return [np.clip(run(engine, {given: x[None]})[image][0] / 2 + 0.5, 0, 1) for x in latents]


def _from_parts(bundle: Bundle, config: EngineConfig, size: tuple[int, int] | None, text: Arrays,
                time: Arrays) -> tuple[Arrays, Arrays]:
    """Return `text` and `time`, and what engines of the denoiser's other parts make of them, of this config's kind."""
    text, time = dict(text), dict(time)
    for part, feed in (("text", text), ("time", time)):
        name, component = bundle.graph(bundle.denoiser, part)
        own = bundle.config(name, backend=config.backend, size=size, batch=component.row_counts(1)[-1],
                            dtype=config.dtype, device=config.device, threads=config.threads, options=config.options)
        engine = store.load(bundle, name, own)
        feed |= in_rows(engine, {given: feed[given] for given in engine.inputs})
    return text, time


def _conditions(bundle: Bundle, component: Component, config: EngineConfig, seed: int) -> Arrays:
    """Return the denoiser's inputs beside sample and timestep, two rows of each.

    Text states are those of the reference's text encoder for seeded tokens; others are drawn as for checks of one call.
    """
    specs = [spec.resolve(config.dims) for spec in component.inputs if spec.name not in ("sample", "timestep")]
    feed = inputs(specs, seed)
    states: dict[tuple[int, ...], np.ndarray] = {}
    for text in bundle.manifest.text[:1]:
        own = bundle.config(text.component, backend="onnxruntime", batch=2)
        tokens = inputs([s.resolve(own.dims) for s in bundle.component(text.component).inputs], seed)
        states = {value.shape: value for value in reference(bundle, text.component, own, tokens).values()}
    return {name: states.get(value.shape, value) for name, value in feed.items()}
