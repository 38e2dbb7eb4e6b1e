"""Engines beside the ONNX Runtime float32 reference, at their own static shapes: are they right, and how fast?

The statistics are those of polygraphy's comparisons (error, cosine, PSNR, NaN and Inf); they need numpy alone, where
polygraphy would want both engines behind its own runners.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.backend import Engine, Target, backend
from engines.bundle import Bundle, Check
from engines.check.tolerance import TOLERANCE
from engines.machine import cpu, gpu
from engines.spec import EngineConfig, EngineError, TensorSpec

SEED = 0
"""Seed of the inputs that engines are compared on."""
REFERENCE = "onnxruntime fp32 on cpu"
ITSELF = "none: this engine is the reference"
LEAST_CALLS, MOST_CALLS, ENOUGH_SECONDS = 3, 10, 0.2
"""Timed calls of an engine: at least, and at most unless they have taken that long together."""


@dataclass(frozen=True)
class Difference:
    """The distance of an array from its reference. All but the counts are of the values that are finite in both.

    max_abs, mean_abs: largest and mean absolute difference. rel_rms: RMS of the difference over RMS of the reference.
    psnr: dB, 20·log10(peak / RMS of the difference), infinite for equal arrays. cosine: of the angle between the two as
    vectors. nan, inf: how many values are NaN or infinite; reference_nan, reference_inf: how many of the reference.
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
        """Return whether every value of the array is finite."""
        return not (self.nan or self.inf)

    def to_json(self) -> dict[str, float | int | None]:
        """Return the fields by name; null for a number that JSON does not have."""
        return {name: v if math.isfinite(v) else None for name, v in dataclasses.asdict(self).items()}


@dataclass(frozen=True)
class Timing:
    """The time of one call of an engine: median seconds of `runs` calls after a first, and the machine they ran on."""

    seconds: float
    runs: int
    machine: str


@dataclass(frozen=True)
class Measured:
    """Figures of an engine that was run on seeded inputs.

    outputs: name → difference from the reference; empty for the reference itself. precision: what it computes in, a key
    of TOLERANCE.
    """

    outputs: Mapping[str, Difference]
    timing: Timing
    precision: str


def check(bundle: Bundle, name: str, config: EngineConfig, directory: Path, seed: int = SEED) -> tuple[Check, Timing]:
    """Compare the engine in `directory` with the reference on seeded inputs, and time it.

    Raises EngineError for NaN or Inf, or a difference over TOLERANCE. The fp32 ONNX Runtime engine on a CPU is compared
    with nothing: it is the reference.
    """
    measured = measure(bundle, name, config, directory, seed)
    if is_reference(config):
        return Check(ITSELF, seed, 0.0, 0.0), measured.timing
    return _verdict(measured.outputs, measured.precision, describe(name, config), seed, REFERENCE), measured.timing


def measure(bundle: Bundle, name: str, config: EngineConfig, directory: Path, seed: int = SEED) -> Measured:
    """Return the figures that `check` judges."""
    target = Target.of(bundle, name, config)
    feed = inputs(target.inputs.values(), seed)
    expected = {} if is_reference(config) else run_reference(target, feed)  # its memory is free again by now
    engine = backend(config.backend).load(target, directory)
    got, timing = run_timed(engine, feed)
    return Measured({output: difference(got[output], truth) for output, truth in expected.items()}, timing,
                    precision(engine, config))


def precision(engine: Engine, config: EngineConfig) -> str:
    """Return what an engine computes in, a key of TOLERANCE: what it says itself, else the config's dtype."""
    return engine.precision or config.dtype


def is_reference(config: EngineConfig) -> bool:
    """Return whether this engine is what the others are compared with."""
    return (config.backend, config.device, config.dtype) == ("onnxruntime", "cpu", "fp32")


def reference_config(config: EngineConfig) -> EngineConfig:
    """Return the config of the reference engine at the shapes of `config`."""
    return dataclasses.replace(config, backend="onnxruntime", dtype="fp32", device="cpu", options={})


def describe(name: str, config: EngineConfig) -> str:
    """Return an engine in words, for errors."""
    return f"{config.backend} {config.dtype} engine of {name}"


def reference(bundle: Bundle, name: str, config: EngineConfig, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a component's outputs in float32 with ONNX Runtime on this CPU; a 16-bit graph is widened first."""
    return run_reference(Target.of(bundle, name, config), feed)


def run_reference(target: Target, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what `reference` does, for a component that need not be in a bundle yet."""
    with open_reference(target) as engine:
        return run(engine, feed)


@contextlib.contextmanager
def open_reference(target: Target) -> Iterator[Engine]:
    """Open the reference engine of a component at the target's shapes, until the block ends."""
    ort = backend("onnxruntime")
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
    """Run an engine once on buffers of its own. Outputs start as NaN, so one left unwritten is noticed.

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
    """Return what `run` does, and what a further call takes on the machine as it is."""
    seconds: list[float] = []

    def calls(call: Callable[[], None]) -> None:
        while len(seconds) < LEAST_CALLS or (len(seconds) < MOST_CALLS and sum(seconds) < ENOUGH_SECONDS):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)

    outputs = run(engine, feed, calls)
    return outputs, Timing(float(np.median(seconds)), len(seconds), machine(engine.gpu))


def machine(number: int | None = None) -> str:
    """Return the device that times are of, in words: GPU `number`, or this CPU and how many cores of it there are."""
    if number is not None:
        return gpu.gpus()[number].name
    return f"{cpu.describe()['cpu']}, {cpu.physical_cores()} cores"


def machines() -> set[str]:
    """Return every device of this machine, as `machine` names them."""
    return {machine(), *(g.name for g in gpu.gpus())}


def difference(got: np.ndarray, truth: np.ndarray, peak: float | None = None) -> Difference:
    """Return how far `got` is from `truth`, arrays of one shape.

    peak: of the PSNR; the largest magnitude of `truth` if None, where polygraphy takes its largest value, which says
    nothing of a reference that is mostly negative.
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


def arrays(got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], dtype: str, what: str, seed: int,
           reference: str = REFERENCE) -> Check:
    """Return the figures of the worst output. Raises EngineError over the tolerance of `dtype`, and for NaN or Inf."""
    differences = {name: difference(got[name], truth) for name, truth in expected.items()}
    return _verdict(differences, dtype, what, seed, reference)


def judge(output: str, off: Difference, dtype: str, what: str, reference: str = REFERENCE) -> None:
    """Raise EngineError where one output of an engine of `dtype` is over tolerance, or has NaN or Inf."""
    if off.reference_nan or off.reference_inf:
        raise EngineError(f"{what}: {reference} has NaN or Inf in output {output}: the exported graph is wrong; export "
                          "the checkpoint again")
    do = {"fp32": "", "fp8": "; leave --option fp8=linear out"}.get(dtype, "; use --dtype fp32")
    if not off.finite:
        raise EngineError(f"{what}: output {output} has NaN or Inf, the fp32 reference has none"
                          f"{do or '; use --dtype fp32'}")
    if not off.rel_rms <= TOLERANCE[dtype]:
        raise EngineError(f"{what}: output {output} differs from {reference} by {off.rel_rms:.2e} (relative RMS), "
                          f"expected at most {TOLERANCE[dtype]:.0e}{do}")


def _verdict(differences: Mapping[str, Difference], dtype: str, what: str, seed: int, reference: str) -> Check:
    for output, off in differences.items():
        judge(output, off, dtype, what, reference)
    return Check(reference, seed, max((d.max_abs for d in differences.values()), default=0.0),
                 max((d.rel_rms for d in differences.values()), default=0.0))
