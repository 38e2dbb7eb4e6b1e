"""Building one TensorRT plan: parse, configure, build, say what came out. `build` runs in a child process."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import resource
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from engines.spec import EngineError

if TYPE_CHECKING:
    import tensorrt as rt

PLAN, ABOUT = "engine.plan", "tensorrt.json"


@dataclass(frozen=True)
class Request:
    """What to build. flavour: of `engines.BACKENDS`. inputs, outputs: name → static shape. arch: such as "sm_89".

    gpu: number of the GPU to build on, None where it is not needed. timing_cache: file to read and write, or "".
    plugins: kinds of sites that become plugin nodes ("attention", "norm") wherever our kernels can do them, with at
    most `max_shared` bytes of shared memory; optional: build nothing where no site can.
    tolerance: relative RMS that two builds may differ by.
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
    plugins: tuple[str, ...] = ()
    max_shared: int | None = None
    optional: bool = False
    tolerance: float = math.inf


def build(asked: Mapping[str, Any], tell: IO[str]) -> bool:
    """Write PLAN and ABOUT into the directory of `asked`, a Request in JSON; returns whether it did.

    Runs in a child process. Raises EngineError for a graph that TensorRT refuses.
    """
    start = time.perf_counter()
    request = Request(**{**asked, "flags": tuple(asked["flags"]), "plugins": tuple(asked["plugins"])})
    if request.gpu is not None:
        from engines.machine.gpu import select

        select(request.gpu)
    trt = vendor(request.flavour)
    said = logger(trt)
    builder: rt.Builder | None = trt.Builder(said)
    if builder is None:
        raise EngineError(f"{request.flavour}: no builder: {said.why()}")
    model, sites = _with_plugins(trt, request)
    if request.optional and model is None:
        return False
    network = _parse(trt, said, builder, request, model)
    attentions = _decomposable(trt, network)
    config = builder.create_builder_config()
    _configure(trt, config, request)
    monitor = _monitor(trt, tell)  # a name of its own: it has to outlive the build
    config.progress_monitor = monitor
    cache = _timing_cache(config, request)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{request.flavour} could not build {request.onnx} for {request.arch}: {said.why()}"
                          f"{_refit_hint(request)}")
    with open(Path(request.directory) / PLAN, "wb") as file:
        file.write(plan)
    if cache is not None:
        write_whole(Path(request.timing_cache), config.get_timing_cache().serialize())
    about = {"library": {request.flavour: trt.__version__}, "arch": request.arch, "flags": request.flags,
             "layers": network.num_layers, "attentions": attentions, "sites": sites, "max_shared": request.max_shared,
             "plan_bytes": plan.nbytes, "memory": said.memory, "warnings": said.warnings,
             "build_seconds": round(time.perf_counter() - start, 3),
             "build_peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    (Path(request.directory) / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf8")
    return True


def _with_plugins(trt: Any, request: Request) -> tuple[bytes | None, dict[str, dict[str, int]]]:
    """(the graph with plugin nodes, None for the file as it is; kind → how many sites are which)."""
    if not request.plugins:
        return None, {}
    if missing := [name for name in ("torch", "triton", "onnx_ir", "onnxscript") if find_spec(name) is None]:
        raise EngineError(f"our kernels as plugins: {', '.join(missing)} missing while they are built; run: pip "
                          f"install {' '.join(missing)}, or pass --attention native --norm native")
    from engines.tensorrt import plugin_passes, plugins
    from kernels.aot.artefact import KernelError, arch_for

    arch = int(request.arch.removeprefix("sm_"))
    try:
        arch_for(arch)
    except KernelError as e:
        raise EngineError(f"our kernels as plugins: {e}; pass --attention native --norm native") from e

    def fits(name: str, tensors: Any, site: str) -> bool:
        """Compiles it, so that the plugin finds it in the cache."""
        with contextlib.suppress(KernelError):
            plugins.code(name, tensors, site, arch, request.max_shared)
            return True
        return False

    model, sites = plugin_passes.rewritten(Path(request.onnx), request.inputs, request.plugins, arch, fits)
    if not any(count["ours"] for count in sites.values()):
        return None, sites
    plugins.register(trt, backend(request.flavour).plugins(), arch, request.max_shared)
    return model, sites


def vendor(flavour: str) -> Any:
    """The package of one of the flavours, as `engines.tensorrt.backend` imports it."""
    return backend(flavour).vendor()


def backend(flavour: str) -> Any:
    import engines

    return engines.backend(flavour)


def _parse(trt: Any, log: Any, builder: rt.Builder, request: Request, model: bytes | None) -> rt.INetworkDefinition:
    """The network of the ONNX file, or of `model` with the file's weights, at static shapes."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # always so from TensorRT 11 on
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser: rt.OnnxParser = trt.OnnxParser(network, log)
    if not (parser.parse_from_file(request.onnx) if model is None else parser.parse(model, request.onnx)):
        errors = [parser.get_error(n) for n in range(parser.num_errors)]
        raise EngineError(f"{request.flavour} cannot read {request.onnx}: "
                          + ("; ".join(map(_parse_error, errors[:3])) or log.why())
                          + (f"; and {len(errors) - 3} more" if len(errors) > 3 else ""))
    for n in range(network.num_inputs):
        tensor = network.get_input(n)
        if tensor.name in request.inputs:
            tensor.shape = trt.Dims(request.inputs[tensor.name])
    inputs, outputs = (_shapes(get, count) for get, count in ((network.get_input, network.num_inputs),
                                                              (network.get_output, network.num_outputs)))
    for kind, found, expected in (("inputs", inputs, request.inputs), ("outputs", outputs, request.outputs)):
        if found != {name: tuple(shape) for name, shape in expected.items()}:
            raise EngineError(f"graph {kind} of {request.onnx}: got {found}, expected {dict(expected)} as the manifest "
                              "says; export the bundle again")
    return network


def _shapes(get: Callable[[int], rt.ITensor], count: int) -> dict[str, tuple[int, ...]]:
    return {tensor.name: dims(tensor.shape) for tensor in map(get, range(count))}


def dims(shape: rt.Dims) -> tuple[int, ...]:
    return tuple(shape[n] for n in range(len(shape)))


def _parse_error(error: rt.ParserError) -> str:
    node = f"node {error.node()} {error.node_name()!r} ({error.node_operator()}): " if error.node() >= 0 else ""
    return f"{node}{error.code().name}: {error.desc()}"


def _decomposable(trt: Any, network: rt.INetworkDefinition) -> int:
    """Allow every attention to become several kernels where no fused one exists; returns how many attentions there are.

    Otherwise such a site (a causal one in fp32, say) fails the build.
    """
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)  # TensorRT 10.14
    count = 0
    for n in range(network.num_layers if kind is not None else 0):
        layer: Any = network.get_layer(n)
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings' way to reach what only this type has
            layer.attention.decomposable = True
            count += 1
    return count


def _configure(trt: Any, config: rt.IBuilderConfig, request: Request) -> None:
    for name in request.flags:
        config.set_flag(getattr(trt.BuilderFlag, name))
    if not request.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names the kernels; contexts turn its NVTX marks off
    if request.optimization_level is not None:
        config.builder_optimization_level = request.optimization_level
    if request.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace << 20)
    if hasattr(trt, "ComputeCapability"):  # TensorRT-RTX; the other builds for the GPU it runs on
        rtx: Any = config
        rtx.num_compute_capabilities = 1
        rtx.set_compute_capability(getattr(trt.ComputeCapability, request.arch.replace("_", "").upper()), 0)


def _timing_cache(config: rt.IBuilderConfig, request: Request) -> rt.ITimingCache | None:
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

