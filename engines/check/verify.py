"""Is an engine right, and how fast? Compare it with the ONNX Runtime float32 reference at its own static shape.

The statistics are those of polygraphy's comparisons (error, cosine, PSNR, NaN and Inf); they need numpy alone, where
polygraphy would want both engines behind its own runners.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import engines
from engines.backend import Engine, Target
from engines.bundle import Bundle, Check
from engines.machine import cpu, gpu
from engines.spec import EngineConfig, EngineError, TensorSpec

TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "fp8": 1e-1}
"""Largest RMS of the difference over RMS of the reference that an engine of each dtype may have; fp8: one of any dtype
with linear layers in float8, which says so (`precision`)."""

SEED = 0
REFERENCE = "onnxruntime fp32 on cpu"
ITSELF = "none: this engine is the reference"
LEAST_CALLS, MOST_CALLS, ENOUGH_SECONDS = 3, 10, 0.2
"""Timed calls of an engine: at least, and at most unless they have taken that long together."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Difference:
    """How far an array is from its reference. All but the counts are of the values that are finite in both.

    max_abs, mean_abs: of the absolute differences. rel_rms: RMS of the difference over RMS of the reference. psnr: dB,
    20·log10(peak / RMS of the difference), infinite for equal arrays. cosine: of the angle between the two as vectors.
    nan, inf: how many values are so; reference_nan, reference_inf: how many of the reference.
    """

    max_abs: float
    mean_abs: float
    rel_rms: float
    psnr: float
    cosine: float
    nan: int
    inf: int
    reference_nan: int
    reference_inf: int

    @property
    def finite(self) -> bool:
        """Whether every value is."""
        return not (self.nan or self.inf)

    def to_json(self) -> dict[str, float | int | None]:
        """Its fields; null for a number that JSON does not have."""
        return {name: v if math.isfinite(v) else None for name, v in dataclasses.asdict(self).items()}


@dataclass(frozen=True)
class Timing:
    """What a call of an engine takes: median seconds of `runs` calls after a first, and the device they ran on."""

    seconds: float
    runs: int
    machine: str


@dataclass(frozen=True)
class Measured:
    """An engine run on seeded inputs. outputs: name → difference from the reference; empty for the reference itself.

    precision: what it computes in, a key of TOLERANCE.
    """

    outputs: Mapping[str, Difference]
    timing: Timing
    precision: str


def check(bundle: Bundle, name: str, config: EngineConfig, directory: Path, seed: int = SEED) -> tuple[Check, Timing]:
    """Compare the engine in `directory` with the reference on seeded inputs, and time it.

    Raises EngineError for NaN or Inf, or a difference over TOLERANCE. The fp32 ONNX Runtime engine on a CPU is compared
    with nothing: it is the reference.
    """
    found = measure(bundle, name, config, directory, seed)
    if is_reference(config):
        return Check(ITSELF, seed, 0.0, 0.0), found.timing
    return _verdict(found.outputs, found.precision, describe(name, config), seed, REFERENCE), found.timing


def measure(bundle: Bundle, name: str, config: EngineConfig, directory: Path, seed: int = SEED) -> Measured:
    """The figures that `check` judges."""
    component = bundle.component(name)
    feed = inputs([s.resolve(config.dims) for s in component.inputs], seed)
    expected = {} if is_reference(config) else reference(bundle, name, config, feed)  # its memory is free again by now
    engine = engines.backend(config.backend).load(Target.of(bundle, name, config), directory)
    got, timing = run_timed(engine, feed)
    return Measured({output: difference(got[output], truth) for output, truth in expected.items()}, timing,
                    precision(engine, config))


def precision(engine: Engine, config: EngineConfig) -> str:
    """What an engine computes in, a key of TOLERANCE: what it says itself, else the config's dtype."""
    return engine.precision or config.dtype


def is_reference(config: EngineConfig) -> bool:
    """Whether this engine is what the others are compared with."""
    return (config.backend, config.device, config.dtype) == ("onnxruntime", "cpu", "fp32")


def reference_config(config: EngineConfig) -> EngineConfig:
    """The config of the reference engine at the shapes of `config`."""
    return dataclasses.replace(config, backend="onnxruntime", dtype="fp32", device="cpu", options={})


def describe(name: str, config: EngineConfig) -> str:
    """An engine in words, for errors."""
    return f"{config.backend} {config.dtype} engine of {name}"


def reference(bundle: Bundle, name: str, config: EngineConfig, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs of the component in float32 with ONNX Runtime on this CPU; a 16-bit graph is widened first."""
    return run_reference(Target.of(bundle, name, config), feed)


def run_reference(target: Target, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`reference` for a component that need not be in a bundle yet."""
    with open_reference(target) as engine:
        return run(engine, feed)


@contextlib.contextmanager
def open_reference(target: Target) -> Iterator[Engine]:
    """The reference engine of a component at the target's shapes, until the block ends."""
    ort = engines.backend("onnxruntime")
    target = dataclasses.replace(target, config=reference_config(target.config))
    with tempfile.TemporaryDirectory() as directory:
        ort.build(target, Path(directory))
        yield ort.load(target, Path(directory))


def inputs(specs: Iterable[TensorSpec], seed: int) -> dict[str, np.ndarray]:
    """Return seeded values by name: of a spec's span, else standard normal numbers, or whole ones below 256."""
    rng = np.random.default_rng(seed)
    feed = {}
    for spec in specs:
        shape = tuple(int(d) for d in spec.shape)
        if np.dtype(spec.dtype).kind != "f":
            low, high = spec.span or (0, 256)
            feed[spec.name] = rng.integers(int(low), int(high), shape).astype(spec.dtype)
        elif spec.span is not None:
            feed[spec.name] = rng.uniform(*spec.span, shape).astype(spec.dtype)
        else:
            feed[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
    return feed


def run(engine: Engine, feed: Mapping[str, np.ndarray],
        again: Callable[[Callable[[], None]], object] | None = None) -> dict[str, np.ndarray]:
    """One run of an engine on buffers of its own; outputs start as NaN, so one left unwritten is noticed.

    An engine that says which GPU it runs on (`gpu`, its number) gets them there. again: as of `gpu.run`.
    """
    outputs = {name: spec.empty() for name, spec in engine.outputs.items()}
    for array in outputs.values():
        array.fill(np.nan if array.dtype.kind == "f" else 0)
    if engine.gpu is not None:
        gpu.run(engine, engine.gpu, feed, outputs, again)
    else:
        engine.bind({**feed, **outputs})
        engine.enqueue()
        if again is not None:
            again(engine.enqueue)
    return outputs


def run_timed(engine: Engine, feed: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Timing]:
    """`run`, and what a further call takes on the machine as it is."""
    seconds: list[float] = []

    def calls(call: Callable[[], None]) -> None:
        while len(seconds) < LEAST_CALLS or (len(seconds) < MOST_CALLS and sum(seconds) < ENOUGH_SECONDS):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)

    outputs = run(engine, feed, calls)
    return outputs, Timing(float(np.median(seconds)), len(seconds), machine(engine.gpu))


def machine(number: int | None = None) -> str:
    """The device that times are of, in words: GPU `number`, or this CPU and how many cores of it there are."""
    if number is not None:
        return gpu.gpus()[number].name
    return f"{cpu.describe()['cpu']}, {cpu.physical_cores()} cores"


def machines() -> set[str]:
    """Every device of this machine, as `machine` names them."""
    return {machine(), *(g.name for g in gpu.gpus())}


def difference(got: np.ndarray, truth: np.ndarray, peak: float | None = None) -> Difference:
    """How far `got` is from `truth`, arrays of one shape. peak: of the PSNR; the largest magnitude of `truth` if None.

    polygraphy's PSNR has the largest value of the reference there, which says nothing of one that is mostly negative.
    """
    finite = np.isfinite(got) & np.isfinite(truth)
    a, b = got[finite].astype(np.float64), truth[finite].astype(np.float64)
    counts = [int(count(array).sum()) for array in (got, truth) for count in (np.isnan, np.isinf)]
    if not a.size:
        return Difference(math.nan, math.nan, math.nan, math.nan, math.nan, *counts)
    off = np.abs(a - b)
    rms, length = float(np.sqrt(np.mean(off**2))), float(np.linalg.norm(a) * np.linalg.norm(b))
    peak = float(np.abs(b).max()) if peak is None else peak
    psnr = math.inf if rms == 0 else -math.inf if peak == 0 else 20 * math.log10(peak / rms)
    return Difference(float(off.max()), float(off.mean()), rms / max(float(np.sqrt(np.mean(b**2))), 1e-30), psnr,
                      float(a @ b) / length if length else float(rms == 0), *counts)


def compare(got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], dtype: str, what: str,
            seed: int, reference: str = REFERENCE) -> Check:
    """Figures of the worst output. Raises EngineError over the tolerance of `dtype`, and for NaN or Inf."""
    found = {name: difference(got[name], truth) for name, truth in expected.items()}
    return _verdict(found, dtype, what, seed, reference)


def judge(output: str, found: Difference, dtype: str, what: str, reference: str = REFERENCE) -> None:
    """Raises EngineError where one output of an engine of `dtype` is over tolerance, or has NaN or Inf."""
    if found.reference_nan or found.reference_inf:
        raise EngineError(f"{what}: {reference} has NaN or Inf in output {output}: the exported graph is wrong; export "
                          "the checkpoint again")
    do = {"fp32": "", "fp8": "; leave --option fp8=linear out"}.get(dtype, "; use --dtype fp32")
    if not found.finite:
        raise EngineError(f"{what}: output {output} has NaN or Inf, the fp32 reference has none"
                          f"{do or '; use --dtype fp32'}")
    if not found.rel_rms <= TOLERANCE[dtype]:
        raise EngineError(f"{what}: output {output} differs from {reference} by {found.rel_rms:.2e} (relative RMS), "
                          f"expected at most {TOLERANCE[dtype]:.0e}{do}")


def _verdict(found: Mapping[str, Difference], dtype: str, what: str, seed: int, reference: str) -> Check:
    for output, one in found.items():
        judge(output, one, dtype, what, reference)
    return Check(reference, seed, max((d.max_abs for d in found.values()), default=0.0),
                 max((d.rel_rms for d in found.values()), default=0.0))
