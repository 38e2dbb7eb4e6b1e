"""Building one TensorRT plan: parse, configure, build, say what came out. `build` runs in a child process."""

from __future__ import annotations

import contextlib
import math
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from engines.machine import gpu
from engines.spec import EngineError
from engines.tensorrt import record, vendor

if TYPE_CHECKING:
    import tensorrt as rt


@dataclass(frozen=True)
class BuildRequest:
    """A request says what to build.

    flavour: of `engines.tensorrt.vendor.PIP`. inputs, outputs: name → static shape. arch: as "sm_89".

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
    gpu: int | None = None
    tf32: bool = False
    flags: tuple[str, ...] = ()
    optimization_level: int | None = None
    workspace: int | None = None
    timing_cache: str = ""
    plugins: tuple[str, ...] = ()
    max_shared: int | None = None
    optional: bool = False
    tolerance: float = math.inf

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the request of which `dataclasses.asdict` made `data`, by way of JSON."""
        return cls(**{**data, "flags": tuple(data["flags"]), "plugins": tuple(data["plugins"])})


def build(asked: Mapping[str, Any], tell: IO[str]) -> bool:
    """Write plan and record into the directory of `asked`, a BuildRequest in JSON; return whether it did.

    Runs in a child process. Raises EngineError for a graph that TensorRT refuses.
    """
    start = time.perf_counter()
    request = BuildRequest.from_json(asked)
    if request.gpu is not None:
        gpu.select(request.gpu)
    trt = vendor.package(request.flavour)
    said = vendor.log(trt)
    builder: rt.Builder | None = trt.Builder(said)
    if builder is None:
        raise EngineError(f"{request.flavour}: no builder: {said.why()}")
    model, sites = _with_plugins(trt, request)
    if request.optional and model is None:
        return False
    network = parse(trt, builder, request, model)
    attentions = _decomposable(trt, network)
    config = builder.create_builder_config()
    _configure(trt, config, request)
    monitor = vendor.monitor(trt, tell)  # a name of its own: it has to outlive the build
    config.progress_monitor = monitor
    cache = _timing_cache(config, request)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{request.flavour} could not build {request.onnx} for {request.arch}: {said.why()}"
                          f"{_refit_hint(request)}")
    with open(Path(request.directory) / record.PLAN, "wb") as file:
        file.write(plan)
    if cache is not None:
        record.write_whole(Path(request.timing_cache), config.get_timing_cache().serialize())
    record.write(Path(request.directory), {
        "library": {request.flavour: trt.__version__}, "arch": request.arch, "flags": request.flags,
        "layers": network.num_layers, "attentions": attentions, "sites": sites, "max_shared": request.max_shared,
        "plan_bytes": plan.nbytes, "memory": said.memory, "warnings": said.warnings,
        "build_seconds": round(time.perf_counter() - start, 3),
        "build_peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss})
    return True


def parse(trt: Any, builder: rt.Builder, request: BuildRequest, model: bytes | None) -> rt.INetworkDefinition:
    """Return the network of the ONNX file, or of `model` with the file's weights, at the request's static shapes.

    Raises EngineError for a graph that TensorRT cannot read, or whose inputs or outputs are not the request's.
    """
    network = builder.create_network(vendor.network_flags(trt))
    parser: rt.OnnxParser = trt.OnnxParser(network, vendor.log(trt))
    if not (parser.parse_from_file(request.onnx) if model is None else parser.parse(model, request.onnx)):
        errors = [parser.get_error(n) for n in range(parser.num_errors)]
        raise EngineError(f"{request.flavour} cannot read {request.onnx}: "
                          + ("; ".join(map(_parse_error, errors[:3])) or vendor.log(trt).why())
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


def _with_plugins(trt: Any, request: BuildRequest) -> tuple[bytes | None, dict[str, dict[str, int]]]:
    """Return the graph with plugin nodes, None for the file as it is, and kind → how many sites are ours or not."""
    if not request.plugins:
        return None, {}
    if missing := [name for name in ("torch", "triton", "onnx_ir", "onnxscript") if find_spec(name) is None]:
        raise EngineError(f"our kernels as plugins: {', '.join(missing)} missing while they are built; run: pip "
                          f"install {' '.join(missing)}, or pass --attention vendor --norm vendor")
    from engines.tensorrt import plugin_passes, plugins
    from kernels.aot.artefact import KernelError, arch_for

    arch = int(request.arch.removeprefix("sm_"))
    try:
        arch_for(arch)
    except KernelError as e:
        raise EngineError(f"our kernels as plugins: {e}; pass --attention vendor --norm vendor") from e

    def fits(name: str, tensors: Any, site: str) -> bool:
        """Compiles it, so that the plugin finds it in the cache."""
        with contextlib.suppress(KernelError):
            plugins.code(name, tensors, site, arch, request.max_shared)
            return True
        return False

    model, sites = plugin_passes.rewritten(Path(request.onnx), request.inputs, request.plugins, arch, fits)
    if not any(count["ours"] for count in sites.values()):
        return None, sites
    plugins.register(trt, vendor.plugin_package(request.flavour), arch, request.max_shared)
    return model, sites


def _shapes(get: Callable[[int], rt.ITensor], count: int) -> dict[str, tuple[int, ...]]:
    return {tensor.name: vendor.dims(tensor.shape) for tensor in map(get, range(count))}


def _parse_error(error: rt.ParserError) -> str:
    node = f"node {error.node()} {error.node_name()!r} ({error.node_operator()}): " if error.node() >= 0 else ""
    return f"{node}{error.code().name}: {error.desc()}"


def _decomposable(trt: Any, network: rt.INetworkDefinition) -> int:
    """Allow every attention to become several kernels where no fused one exists; return how many attentions there are.

    Otherwise such a site (a causal one in fp32, say) fails the build.
    """
    kind = vendor.attention_layer(trt)
    count = 0
    for n in range(network.num_layers if kind is not None else 0):
        layer: Any = network.get_layer(n)
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings' way to reach what only this type has
            layer.attention.decomposable = True
            count += 1
    return count


def _configure(trt: Any, config: rt.IBuilderConfig, request: BuildRequest) -> None:
    for name in request.flags:
        config.set_flag(trt.BuilderFlag.__members__[name])
    if not request.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names the kernels; contexts turn its NVTX marks off
    if request.optimization_level is not None:
        config.builder_optimization_level = request.optimization_level
    if request.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace << 20)
    if request.flavour == vendor.RTX:  # the other builds for the GPU it runs on
        rtx: Any = config
        rtx.num_compute_capabilities = 1
        rtx.set_compute_capability(trt.ComputeCapability.__members__[request.arch.replace("_", "").upper()], 0)


def _timing_cache(config: rt.IBuilderConfig, request: BuildRequest) -> rt.ITimingCache | None:
    """Return measured tactics of earlier builds, so that the next takes the same ones and less time."""
    if not request.timing_cache:
        return None
    file = Path(request.timing_cache)
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    return cache if cache is not None and config.set_timing_cache(cache, False) else None


def _refit_hint(request: BuildRequest) -> str:
    if not request.flags or request.gpu is not None:
        return ""
    return ("; a plan that can be refitted or is stripped needs a GPU while it is built: build it on the machine that "
            "runs it, or leave out the options refit and stripped")
