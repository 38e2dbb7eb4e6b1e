"""Building a TensorRT plan in a process of its own.

The library crashes on some graphs (TensorRT-RTX 1.7.1: one tensor as query, key and value), asks nobody whether to go
on for most of a build (half a minute at Stable Diffusion 1.5's size), and holds several times the weights in memory.
A child that can be killed makes these an EngineError, a Ctrl-C at once, and memory that is given back.

`build` is called by the backend and starts the child, `main`, which reads one request from stdin and writes JSON
messages, one a line.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from engines.spec import EngineError

PLAN, ABOUT = "engine.plan", "tensorrt.json"
CHILD = "from engines.tensorrt_build import main; main()"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Request:
    """What to build. flavour: of `engines.BACKENDS`. inputs, outputs: name → static shape. arch: such as "sm_89".

    gpu: number of the GPU to build on, None where it is not needed. timing_cache: file to read and write, or "".
    """

    flavour: str
    onnx: str
    inputs: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, tuple[int, ...]]
    directory: str
    arch: str
    gpu: int | None
    tf32: bool
    flags: tuple[str, ...]
    optimization_level: int | None
    workspace: int | None
    timing_cache: str


def build(request: Request) -> None:
    """Write PLAN and ABOUT into the request's directory. Raises EngineError for a graph that TensorRT refuses."""
    from tqdm import tqdm

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    with (tempfile.TemporaryFile("w+", errors="replace") as noise,
          tqdm(total=100, bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}", leave=False, disable=None) as bar,
          subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise,
                           text=True, env=environment,
                           start_new_session=True) as child):  # of its own, so that Ctrl-C reaches us alone
        try:
            error = _follow(child, request, bar)
        finally:
            child.kill()
        if error == "":
            return
        noise.seek(0)
        raise EngineError(error or f"{request.flavour} could not build {request.onnx}: the builder died "
                          f"({_ending(child.wait())}): {' '.join(noise.read().split())[-500:] or 'it said nothing'}; "
                          "free memory (it takes three to four times the weights), or use another backend")


def _follow(child: subprocess.Popen[str], request: Request, bar: Any) -> str | None:
    """Show the child's progress; returns its error, "" where it is done, None where it ended without a word."""
    assert child.stdin and child.stdout
    try:
        with child.stdin:
            json.dump(dataclasses.asdict(request), child.stdin)
    except BrokenPipeError:
        child.wait()
        return None
    for line in child.stdout:
        message = json.loads(line)
        if "error" in message:
            return str(message["error"])
        bar.set_description(message["phase"], refresh=False)
        bar.n = message["percent"]
        bar.refresh()  # at once: the phase that begins may say nothing for long
    return "" if child.wait() == 0 else None


def _ending(status: int) -> str:
    return f"status {status}" if status >= 0 else signal.Signals(-status).name


def main() -> None:
    """The child: one request from stdin, messages to stdout. What the library itself prints goes to stderr."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    tell = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    try:
        _build(Request(**{**request, "flags": tuple(request["flags"])}), tell)
    except EngineError as e:
        print(json.dumps({"error": str(e)}), file=tell)


def _build(request: Request, tell: IO[str]) -> None:
    start = time.perf_counter()
    if request.gpu is not None:
        from engines.gpu import select

        select(request.gpu)
    trt = _flavour(request.flavour).vendor()
    log = logger(trt)
    builder = trt.Builder(log)
    if builder is None:
        raise EngineError(f"{request.flavour}: no builder: {log.why()}")
    network = _parse(trt, log, builder, request)
    attentions = _decomposable(trt, network)
    config = builder.create_builder_config()
    _configure(trt, config, request)
    monitor = _monitor(trt, tell)  # a name of its own: it has to outlive the build
    config.progress_monitor = monitor
    cache = _timing_cache(config, request)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{request.flavour} could not build {request.onnx} for {request.arch}: {log.why()}"
                          f"{_refit_hint(request)}")
    with open(Path(request.directory) / PLAN, "wb") as file:
        file.write(plan)
    if cache is not None:
        write_whole(Path(request.timing_cache), config.get_timing_cache().serialize())
    about = {"library": {request.flavour: trt.__version__}, "arch": request.arch, "flags": request.flags,
             "layers": network.num_layers, "attentions": attentions, "plan_bytes": plan.nbytes, "memory": log.memory,
             **(_inspect(trt, log, plan) if request.gpu is not None else {}), "warnings": log.warnings,
             "build_seconds": round(time.perf_counter() - start, 3),
             "build_peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    (Path(request.directory) / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf8")


def _flavour(name: str) -> Any:
    import engines

    return engines.backend(name)


def _parse(trt: Any, log: Any, builder: Any, request: Request) -> Any:
    """The network of the ONNX file at static shapes."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # always so from TensorRT 11 on
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(request.onnx):
        errors = [parser.get_error(n) for n in range(parser.num_errors)]
        raise EngineError(f"{request.flavour} cannot read {request.onnx}: "
                          + ("; ".join(map(_parse_error, errors[:3])) or log.why())
                          + (f"; and {len(errors) - 3} more" if len(errors) > 3 else ""))
    for n in range(network.num_inputs):
        tensor = network.get_input(n)
        if tensor.name in request.inputs:
            tensor.shape = request.inputs[tensor.name]
    inputs, outputs = (_shapes(get, count) for get, count in ((network.get_input, network.num_inputs),
                                                              (network.get_output, network.num_outputs)))
    for kind, found, expected in (("inputs", inputs, request.inputs), ("outputs", outputs, request.outputs)):
        if found != {name: tuple(shape) for name, shape in expected.items()}:
            raise EngineError(f"graph {kind} of {request.onnx}: got {found}, expected {dict(expected)} as the manifest "
                              "says; export the bundle again")
    return network


def _shapes(get: Callable[[int], Any], count: int) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(tensor.shape) for tensor in map(get, range(count))}


def _parse_error(error: Any) -> str:
    node = f"node {error.node()} {error.node_name()!r} ({error.node_operator()}): " if error.node() >= 0 else ""
    return f"{node}{error.code().name}: {error.desc()}"


def _decomposable(trt: Any, network: Any) -> int:
    """Allow every attention to become several kernels where no fused one exists; returns how many attentions there are.

    Otherwise such a site (a causal one in fp32, say) fails the build.
    """
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)  # TensorRT 10.14
    count = 0
    for n in range(network.num_layers if kind is not None else 0):
        layer = network.get_layer(n)
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings' way to reach what only this type has
            layer.attention.decomposable = True
            count += 1
    return count


def _configure(trt: Any, config: Any, request: Request) -> None:
    for name in request.flags:
        config.set_flag(getattr(trt.BuilderFlag, name))
    if not request.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if request.optimization_level is not None:
        config.builder_optimization_level = request.optimization_level
    if request.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace << 20)
    if hasattr(trt, "ComputeCapability"):  # TensorRT-RTX; the other builds for the GPU it runs on
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, request.arch.replace("_", "").upper()), 0)


def _timing_cache(config: Any, request: Request) -> Any:
    """Measured tactics of earlier builds, so that the next takes the same ones and less time."""
    if not request.timing_cache:
        return None
    file = Path(request.timing_cache)
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    return cache if cache is not None and config.set_timing_cache(cache, False) else None


def _refit_hint(request: Request) -> str:
    if not request.flags or request.gpu is not None:
        return ""
    return ("; a plan that can be refitted or is stripped needs a GPU while it is built: build it on the machine that "
            "runs it, or leave out the options refit and stripped")


def _inspect(trt: Any, log: Any, plan: Any) -> dict[str, Any]:
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        return {"opened": log.why()}
    return {"engine_layers": engine.num_layers, "device_memory_bytes": engine.device_memory_size_v2,
            "refittable": sorted(trt.Refitter(engine, log).get_all_weights()) if engine.refittable else []}


def write_whole(file: Path, data: Any) -> None:
    """Write `data` (anything with a buffer) under a temporary name, then rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as temporary:
        temporary.write(data)
    os.replace(temporary.name, file)


@functools.cache
def logger(trt: Any) -> Any:
    """The logger of this process: TensorRT keeps the first that it is given. Remembers errors, warnings and sizes."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.memory: dict[str, int] = {}

        def log(self, severity: Any, message: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                self.errors.append(message)
            elif severity.name == "WARNING":
                self.warnings.append(message)
            elif size := re.fullmatch(r"(?:Total|Max) (\w+) Memory: (\d+) bytes", message):
                self.memory[size[1].lower()] = int(size[2])

        def why(self) -> str:
            """What went wrong, for an error message; forgets it."""
            errors, self.errors = self.errors, []
            return errors[0].strip() if errors else "it did not say why"

    return Log()


def _monitor(trt: Any, tell: IO[str]) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Sends how far the build is. Phases nest: a step of one is done when the phases inside it are."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, list[int]] = {}  # name → [steps, steps done], outermost first
            self.told: tuple[str, int] | None = None

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases[name] = [steps, 0]
            self.tell()

        def step_complete(self, name: str, step: int) -> bool:
            if name in self.phases:
                self.phases[name][1] = step + 1
            return self.tell()

        def phase_finish(self, name: str) -> None:
            self.phases.pop(name, None)

        def tell(self) -> bool:
            """False stops the build: nobody listens any more."""
            fraction = 0.0
            for steps, done in reversed(self.phases.values()):
                fraction = min(1.0, (done + fraction) / steps)
            if self.phases and self.told != (now := (list(self.phases)[-1], int(100 * fraction))):
                self.told = now
                try:
                    print(json.dumps({"phase": now[0], "percent": now[1]}), file=tell)
                except BrokenPipeError:
                    return False
            return True

    return Monitor()

