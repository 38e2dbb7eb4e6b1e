"""OpenVINO on CPUs, in bfloat16 where the CPU has it.

Where our C++ kernels are built, attention and group norm with SiLU are theirs, in fp32 and bf16 (`--option
attention=openvino` and `--option norm=openvino` keep the plugin's). A model is compiled anew at
every load: an exported blob holds the weights in full and imports no faster than the ONNX file compiles
(`docs/engines.md` has the figures).

Under a 16-bit precision hint the plugin rounds the timestep itself (999 becomes 1000 in bfloat16) and the angles whose
sine and cosine embed it. So what leads to a sine or cosine is compiled apart, in fp32, and hands its few numbers over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engines.backend import Backend, Engine, Layer, Target
from engines.machine.buffers import check_array, check_names
from engines.machine.cpu import describe
from engines.machine.vendor import errors, importing
from engines.onnx.initializers import refitted
from engines.onnx.low_rank import Weight
from engines.openvino.passes import (
    cut_angles,
    fold_halves,
    halve_gates,
    narrow,
    own_attention,
    own_group_norm,
    replace,
    widen,
)
from engines.spec import EngineConfig, EngineError, TensorSpec
from kernels.cpu import library

PIP = "pip install openvino"
PRECISION = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
KERNELS = {"attention": ("Attention", own_attention), "norm": ("GroupNormSilu", own_group_norm)}
"""Option that chooses whose kernel → our op, and the pass that puts it in the graph."""


class OpenVino(Backend):
    """OpenVINO as a backend."""

    name = "openvino"

    def available(self) -> str | None:
        """None where it can be used, else what to do."""
        try:
            _vendor()
        except EngineError as e:
            return str(e)
        return None

    def devices(self) -> list[str]:
        return ["cpu"] if "CPU" in _vendor().Core().available_devices else []

    def dtypes(self) -> tuple[str, ...]:
        """Precisions this machine computes in, the one to prefer first."""
        has = _vendor().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return tuple(dtype for dtype in ("bf16", "fp32", "fp16") if dtype.upper() in has)

    def versions(self, config: EngineConfig | None = None) -> dict[str, str]:
        """What a cached engine depends on beside files and config."""
        own = config is not None and any(_ours(config, kind) for kind in KERNELS)
        return {"openvino": _vendor().get_version(), **({"kernels": library.fingerprint()} if own else {}), **describe()}

    def build(self, target: Target, directory: Path) -> None:
        """Nothing is written; refuses a device or precision that this machine does not have."""
        if target.config.device != "cpu":
            raise EngineError(f"openvino: got device {target.config.device!r}, expected 'cpu'")
        if target.config.dtype not in self.dtypes():
            raise EngineError(f"openvino: got dtype {target.config.dtype}, but {describe()['cpu']} computes in "
                              f"{', '.join(self.dtypes())}; pass --dtype fp32")
        for kind in KERNELS:
            _ours(target.config, kind)

    def load(self, target: Target, directory: Path) -> OpenVinoEngine:
        """Compile the graph for the config's static shapes. Raises EngineError where OpenVINO cannot."""
        return OpenVinoEngine(target)

    def layers(self, target: Target, directory: Path, feed: Mapping[str, np.ndarray],
               calls: int) -> list[Layer]:
        """See `engines.backend.Backend`. What the plugin has folded into another layer, or need not do, is none of them."""
        engine = OpenVinoEngine(target, counters=True)
        engine.bind({**feed, **{name: spec.empty() for name, spec in engine.outputs.items()}})
        found = []
        for _ in range(calls + 1):
            engine.enqueue()
            found.append({node.node_name: node for node in engine.counters()})
        nodes = {name: node for call in found for name, node in call.items()}  # one of no microsecond counts as not run
        seconds = {name: [call[name].real_time.total_seconds() if name in call else 0.0 for call in found[1:]]
                   for name in nodes}
        return [_layer(name, node.node_type, node.exec_type, float(np.median(seconds[name])) if calls else None)
                for name, node in nodes.items()]


OPENVINO = OpenVino()


def _layer(name: str, kind: str, implementation: str, seconds: float | None) -> Layer:
    """A node of the plugin's; an implementation is named as in "brgconv_avx512_amx_bf16", one of our ops "ref_bf16"."""
    kernel, _, precision = implementation.rpartition("_")
    own = next((op for op, _ in KERNELS.values() if kind == "Reference" and name.startswith(f"{op}_")), None)
    return Layer(name, own or kind, "latentrt" if own else kernel, precision, seconds)


def _ours(config: EngineConfig, kind: str) -> bool:
    """Whether an engine computes with our kernel of this kind, or with OpenVINO's."""
    wanted = config.options.get(kind)
    missing = _extension_missing()
    if wanted not in (None, "latentrt", "openvino"):
        raise EngineError(f"option {kind}: got {wanted!r}, expected one of latentrt, openvino")
    if wanted == "latentrt" and (missing or config.dtype == "fp16"):
        raise EngineError(f"option {kind}: {missing or 'got dtype fp16, expected fp32 or bf16'}")
    return wanted == "latentrt" or (wanted is None and not missing and config.dtype != "fp16")


@functools.cache
def _extension_missing() -> str | None:
    """None where our kernels load into this OpenVINO, else what to do."""
    try:
        _vendor().Core().add_extension(str(library.openvino_extension()))
    except library.CpuKernelError as e:
        return str(e)
    except RuntimeError as e:  # built for another version of OpenVINO
        return f"{library.EXTENSION} does not load: {e}; {library.BUILD} --no-build-isolation"
    return None


class OpenVinoEngine(Engine):
    """Infer requests with static shapes: the fp32 angles, if any, then the rest; see `engines.backend.Engine`.

    counters: have every layer timed, which costs time itself; `counters()` then has the figures of the last call.
    """

    def __init__(self, target: Target, counters: bool = False) -> None:
        self.inputs: Mapping[str, TensorSpec] = target.inputs
        self.outputs: Mapping[str, TensorSpec] = target.outputs
        self._onnx = target.onnx
        self._dtype = target.component.dtype
        self._config = target.config
        self._counters = counters
        self._buffers: dict[str, np.ndarray] = {}
        self._models = self._read()  # the compiled ones hold the memory of their constants too
        self._requests = self._start(self._models)

    def bind(self, buffers: Mapping[str, Any]) -> None:
        check_names(buffers, {**self.inputs, **self.outputs})
        for name, spec in {**self.inputs, **self.outputs}.items():
            check_array(spec, buffers[name])
        self._buffers = dict(buffers)  # keeps the memory alive while its address is bound
        tensor = _vendor().Tensor
        with errors("openvino could not bind"):
            for name, array in self._buffers.items():
                for request in self._requests:
                    if name in _names(request.get_compiled_model()):
                        request.set_tensor(name, tensor(array, shared_memory=True))

    def enqueue(self, stream: Any = None) -> None:
        if not self._buffers:
            raise EngineError("enqueue: no buffers are bound; call bind first")
        for request in self._requests:
            request.start_async()
            request.wait()

    def refit(self, weights: Mapping[str, Weight]) -> None:
        known = refitted(self._onnx, weights)
        models = [model.clone() for model in self._models]  # which share their constants
        with errors(f"openvino could not compile {self._onnx}"):
            found = set[str]().union(*(replace(_vendor(), model, weights, known) for model in models))
            if lost := sorted(set(weights) - found):
                raise EngineError(f"refit: OpenVINO folded weight {lost[0]!r} away; use --backend onnxruntime to "
                                  "change it")
            requests = self._start(models)
        self._models, self._requests = models, requests
        if self._buffers:
            self.bind(self._buffers)

    def counters(self) -> list[Any]:
        """openvino.ProfilingInfo of the layers that the last call executed, in their order."""
        return [node for request in self._requests for node in request.get_profiling_info()
                if node.status == node.Status.EXECUTED]

    def _read(self) -> list[Any]:
        """The models to compile, in the order to run: the angles, if any, and the rest. Constants keep their names."""
        ov = _vendor()
        core = ov.Core()
        with errors(f"openvino could not compile {self._onnx}"):
            model = core.read_model(self._onnx)
            if self._dtype != "fp32":
                widen(ov, model)
            model.reshape({name: list(spec.shape) for name, spec in self.inputs.items()})
            self._check(model)
            for kind, (op, put) in KERNELS.items():
                if _ours(self._config, kind):
                    core.add_extension(str(library.openvino_extension()))
                    put(ov, model, _own_op(op))
            angles = cut_angles(ov, model) if self._config.dtype != "fp32" else None
            if any(_ours(self._config, kind) for kind in KERNELS):
                halve_gates(ov, model)
                if self._config.dtype == "bf16":
                    narrow(ov, model)
                fold_halves(ov, model)
        return [model] if angles is None else [angles, model]

    def _start(self, models: Sequence[Any]) -> list[Any]:
        """Requests of `models`, compiled."""
        core = _vendor().Core()
        with errors(f"openvino could not compile {self._onnx}"):
            *angles, model = models
            body = core.compile_model(model, "CPU", self._properties(self._config.dtype)).create_infer_request()
            first = [core.compile_model(m, "CPU", self._properties("fp32")).create_infer_request() for m in angles]
            for request in first:
                for port in request.get_compiled_model().outputs:
                    body.set_tensor(port.get_any_name(), request.get_tensor(port))
            return [*first, body]

    def _properties(self, dtype: str) -> dict[str, Any]:
        properties: dict[str, Any] = {"INFERENCE_PRECISION_HINT": PRECISION[dtype], "NUM_STREAMS": 1,
                                      "PERFORMANCE_HINT": "LATENCY"}
        if dtype == "fp32":
            properties["EXECUTION_MODE_HINT"] = "ACCURACY"
        if self._config.threads:
            properties["INFERENCE_NUM_THREADS"] = self._config.threads
        if self._counters:
            properties["PERF_COUNT"] = True
        return {**properties, **{name: v for name, v in self._config.options.items() if name not in KERNELS}}

    def _check(self, model: Any) -> None:
        for kind, ports, specs in (("inputs", model.inputs, self.inputs), ("outputs", model.outputs, self.outputs)):
            shapes = {port.get_any_name(): port.get_partial_shape() for port in ports}
            found = {name: tuple(s.to_shape()) if s.is_static else str(s) for name, s in shapes.items()}
            expected = {name: spec.shape for name, spec in specs.items()}
            if found != expected:
                raise EngineError(f"graph {kind}: got {found}, expected {expected} as the manifest says; "
                                  "export the bundle again")


def _own_op(name: str) -> Callable[..., Any]:
    """Makes nodes of one of our ops, from inputs and attributes."""
    from openvino.utils.node_factory import NodeFactory

    factory = NodeFactory("opset13")
    factory.add_extension(str(library.openvino_extension()))
    return lambda inputs, attributes: factory.create(name, inputs, attributes)


def _names(compiled: Any) -> set[str]:
    return {name for port in (*compiled.inputs, *compiled.outputs) for name in port.get_names()}


def _vendor() -> Any:
    with importing("openvino", PIP):
        import openvino
    return openvino
