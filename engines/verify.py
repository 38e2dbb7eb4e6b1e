"""Is an engine right? Compare it with the ONNX Runtime float32 reference at its own static shape."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

import engines
from engines import gpu
from engines.bundle import Bundle, Check, Component
from engines.spec import Engine, EngineConfig, EngineError, TensorSpec

TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
"""Largest RMS of the difference over RMS of the reference that an engine of each dtype may have."""

SEED = 0
REFERENCE = "onnxruntime fp32 on cpu"
ITSELF = "none: this engine is the reference"

log = logging.getLogger(__name__)


def check(bundle: Bundle, name: str, config: EngineConfig, directory: Path, seed: int = SEED) -> Check:
    """Compare the engine in `directory` with the reference on seeded inputs; returns the figures.

    Raises EngineError for NaN or Inf, or a difference over TOLERANCE. The fp32 ONNX Runtime engine on a CPU is not run:
    it is the reference.
    """
    if is_reference(config):
        return Check(ITSELF, seed, 0.0, 0.0)
    component = bundle.component(name)
    feed = inputs([s.resolve(config.dims) for s in component.inputs], seed)
    expected = reference(bundle, name, config, feed)
    engine = engines.backend(config.backend).load(bundle.path / component.file, component, config, directory)
    return compare(run(engine, feed), expected, config.dtype, f"{config.backend} {config.dtype} engine of {name}", seed)


def is_reference(config: EngineConfig) -> bool:
    """Whether this engine is what the others are compared with."""
    return (config.backend, config.device, config.dtype) == ("onnxruntime", "cpu", "fp32")


def reference(bundle: Bundle, name: str, config: EngineConfig, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs of the component in float32 with ONNX Runtime on this CPU; a 16-bit graph is widened first."""
    component = bundle.component(name)
    return run_reference(bundle.path / component.file, component, config, feed)


def run_reference(onnx: Path, component: Component, config: EngineConfig,
                  feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`reference` for an ONNX file that is not in a bundle yet."""
    ort = engines.backend("onnxruntime")
    config = dataclasses.replace(config, backend="onnxruntime", dtype="fp32", device="cpu", options={})
    with tempfile.TemporaryDirectory() as directory:
        ort.build(onnx, component, config, Path(directory))
        return run(ort.load(onnx, component, config, Path(directory)), feed)


def inputs(specs: Iterable[TensorSpec], seed: int) -> dict[str, np.ndarray]:
    """Seeded values: timesteps and sizes (time_ids) in [0, 1000), other floats standard normal, token ids below 256."""
    rng = np.random.default_rng(seed)
    feed = {}
    for spec in specs:
        shape = tuple(int(d) for d in spec.shape)
        if np.dtype(spec.dtype).kind != "f":
            feed[spec.name] = rng.integers(0, 256, shape).astype(spec.dtype)
        elif spec.name in ("timestep", "time_ids"):
            feed[spec.name] = rng.uniform(0, 1000, shape).astype(spec.dtype)
        else:
            feed[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
    return feed


def run(engine: Engine, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One run of an engine on buffers of its own; outputs start as NaN, so one left unwritten is noticed.

    An engine that says which GPU it runs on (`gpu`, its number) gets them there.
    """
    outputs = {name: spec.empty() for name, spec in engine.outputs.items()}
    for array in outputs.values():
        array.fill(np.nan if array.dtype.kind == "f" else 0)
    if (number := getattr(engine, "gpu", None)) is not None:
        gpu.run(engine, number, feed, outputs)
    else:
        engine.bind({**feed, **outputs})
        engine.enqueue()
    return outputs


def compare(got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], dtype: str, what: str,
            seed: int, reference: str = REFERENCE) -> Check:
    """Figures of the worst output. Raises EngineError over the tolerance of `dtype`, and for NaN or Inf."""
    worst = Check(reference, seed, 0.0, 0.0)
    for name, truth in expected.items():
        if not np.isfinite(got[name]).all():
            raise EngineError(f"{what}: output {name} has NaN or Inf{_blame(truth)}")
        difference = got[name].astype(np.float64) - truth
        rms = float(np.sqrt(np.mean(np.square(truth, dtype=np.float64))))
        relative = float(np.sqrt(np.mean(difference**2))) / max(rms, 1e-30)
        if not relative <= TOLERANCE[dtype]:
            raise EngineError(f"{what}: output {name} differs from {reference} by {relative:.2e} (relative RMS), "
                              f"expected at most {TOLERANCE[dtype]:.0e}"
                              + ("" if dtype == "fp32" else "; use --dtype fp32"))
        largest = float(np.abs(difference).max())
        worst = Check(reference, seed, max(worst.max_abs, largest), max(worst.rel_rms, relative))
    return worst


def _blame(truth: np.ndarray) -> str:
    if np.isfinite(truth).all():
        return ", the fp32 reference has none; use --dtype fp32"
    return ", and so has the fp32 reference: the exported graph is wrong; export the checkpoint again"
