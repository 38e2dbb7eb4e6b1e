"""Plans on the GPU that runs them: how long they take, in turn, and what is inside. Each runs in a child process."""

from __future__ import annotations

import contextlib
import json
import mmap
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from engines.machine import gpu
from engines.spec import EngineError
from engines.tensorrt import vendor
from engines.tensorrt.record import PLAN

if TYPE_CHECKING:
    import tensorrt as rt

ROUNDS, RUNS, WARM = 5, 20, 5
"""Rounds in turn, runs that one round times together, and runs before these that are not timed."""


def measure(request: Mapping[str, Any], tell: IO[str]) -> list[dict[str, Any]]:
    """Time the plans of the request's `directories` in turn; return {rounds, difference} of each.

    rounds: seconds of a run, in each of ROUNDS turns. difference: relative RMS of its outputs from those of the first
    plan, of the worst output. flavour, gpu: as in `engines.tensorrt.build.BuildRequest`. A plan is opened for its round
    alone, so that memory is that of one. Raises EngineError for a plan that does not open or run.
    """
    trt, number = vendor.package(request["flavour"]), request["gpu"]
    gpu.select(number)
    figures: list[dict[str, Any]] = [{"rounds": [], "difference": 0.0} for _ in request["directories"]]
    first: dict[str, np.ndarray] = {}
    steps = ROUNDS * len(figures)
    for turn in range(steps):
        which = turn % len(figures)
        print(json.dumps({"phase": "timing our kernels beside TensorRT's", "percent": 100 * turn // steps}), file=tell)
        with _opened(trt, Path(request["directories"][which]), number) as (_, context, enqueue, outputs):
            context.nvtx_verbosity = trt.ProfilingVerbosity.NONE
            gpu.seconds(number, enqueue, WARM)
            if turn < len(figures):
                found = outputs()
                first = first or found
                figures[which]["difference"] = difference(found, first)
            figures[which]["rounds"].append(gpu.seconds(number, enqueue, RUNS))
    return figures


def inspect(request: Mapping[str, Any], tell: IO[str]) -> dict[str, Any]:
    """Return what is in the plan of the request's `directory`: layers with times, memory, weights that can change."""
    trt, number = vendor.package(request["flavour"]), request["gpu"]
    gpu.select(number)
    with _opened(trt, Path(request["directory"]), number) as (engine, context, enqueue, _):
        text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        times = _profile(trt, context, lambda: gpu.seconds(number, enqueue, 1))
        weights = trt.Refitter(engine, vendor.log(trt)).get_all_weights() if engine.refittable else []
        return {"engine_layers": layers(text, times), "device_memory_bytes": engine.device_memory_size_v2,
                "refittable": sorted(weights)}


def difference(found: Mapping[str, np.ndarray], first: Mapping[str, np.ndarray]) -> float:
    """Return RMS of the difference over RMS of `first`, of the output where it is largest; infinite with NaN or Inf."""
    worst = 0.0
    for name, expected in first.items():
        wide = expected.astype(np.float64)
        apart = float(np.sqrt(np.mean((found[name] - wide) ** 2))) / max(float(np.sqrt(np.mean(wide**2))), 1e-30)
        worst = max(worst, apart if np.isfinite(apart) else np.inf)
    return worst


def layers(text: str, times: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Return what TensorRT's inspector says, one row a layer: name, kind, kernel, milliseconds (median of `times`).

    An engine built without detail has names only; keys that the inspector leaves out are None.
    """
    rows = []
    for layer in json.loads(text).get("Layers", []):
        about = {"Name": layer} if isinstance(layer, str) else layer
        measured = times.get(about.get("Name", ""))
        rows.append({"name": about.get("Name"), "kind": about.get("LayerType"),
                     "kernel": about.get("TacticName") or about.get("TacticValue"),
                     "milliseconds": float(np.median(measured)) if measured else None})
    return rows


def _profile(trt: Any, context: rt.IExecutionContext, run: Callable[[], Any]) -> dict[str, list[float]]:
    """Return the milliseconds of each layer in RUNS runs."""

    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times: dict[str, list[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times.setdefault(layer_name, []).append(ms)

    run()
    profiler = Profiler()
    context.profiler = profiler
    for _ in range(RUNS):
        run()
    return profiler.times


@contextlib.contextmanager
def _opened(trt: Any, directory: Path, number: int) -> Iterator[
        tuple[rt.ICudaEngine, rt.IExecutionContext, Callable[[int], None], Callable[[], dict[str, np.ndarray]]]]:
    """Yield the engine of a plan, a context with seeded inputs, what enqueues one run, and what reads its outputs."""
    log = vendor.log(trt)
    runtime: rt.Runtime = trt.Runtime(log)
    with open(directory / PLAN, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        engine: rt.ICudaEngine | None = runtime.deserialize_cuda_engine(plan)
    context = None if engine is None else engine.create_execution_context()
    if engine is None or context is None:
        raise EngineError(f"{directory / PLAN} does not open: {log.why()}")
    outputs: dict[str, tuple[int, np.ndarray]] = {}
    with contextlib.ExitStack() as stack:
        for n in range(engine.num_io_tensors):
            name = engine.get_tensor_name(n)
            shape = vendor.dims(engine.get_tensor_shape(name))
            dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            values = (rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 256, shape)).astype(dtype)
            address = stack.enter_context(gpu.on_device(number, values))
            context.set_tensor_address(name, address)
            if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT:
                outputs[name] = address, values

        def enqueue(stream: int) -> None:
            if not context.execute_async_v3(stream):
                raise EngineError(f"{directory / PLAN} does not run: {log.why()}")

        def read() -> dict[str, np.ndarray]:
            return {name: gpu.read(number, address, like) for name, (address, like) in outputs.items()}

        yield engine, context, enqueue, read
