"""OpenVINO on CPUs, in bfloat16 where the CPU has it.

Its ONNX reader turns the standard's Attention into ScaledDotProductAttention, which the CPU plugin runs as one fused
kernel in fp32 and bf16, so no graph pass is needed. A model is compiled anew at every load: an exported blob holds the
weights in full and imports no faster than the ONNX file compiles (`docs/engines.md` has the figures).

Under a 16-bit precision hint the plugin rounds the timestep itself (999 becomes 1000 in bfloat16) and the angles whose
sine and cosine embed it. So what leads to a sine or cosine is compiled apart, in fp32, and hands its few numbers over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engines.buffers import check_array, check_names, resolve
from engines.bundle import Component
from engines.cpu import describe
from engines.onnx_file import convert
from engines.spec import EngineConfig, EngineError, TensorSpec

PIP = "pip install openvino"
PRECISION = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
SOURCES = ("openvino.py", "onnx_file.py")
READS_ONNX = True


def available() -> str | None:
    """None where it can be used, else what to do."""
    try:
        _vendor()
    except EngineError as e:
        return str(e)
    return None


def devices() -> list[str]:
    return ["cpu"] if "CPU" in _vendor().Core().available_devices else []


def dtypes() -> tuple[str, ...]:
    """Precisions this machine computes in, the one to prefer first."""
    has = _vendor().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return tuple(dtype for dtype in ("bf16", "fp32", "fp16") if dtype.upper() in has)


def versions(config: EngineConfig | None = None) -> dict[str, str]:
    """What a cached engine depends on beside files and config."""
    return {"openvino": _vendor().get_version(), **describe()}


def build(onnx: Path, component: Component, config: EngineConfig, directory: Path) -> None:
    """Nothing is written; refuses a device or precision that this machine does not have."""
    if config.device != "cpu":
        raise EngineError(f"openvino: got device {config.device!r}, expected 'cpu'")
    if config.dtype not in dtypes():
        raise EngineError(f"openvino: got dtype {config.dtype}, but {describe()['cpu']} computes in "
                          f"{', '.join(dtypes())}; pass --dtype fp32")


def load(onnx: Path, component: Component, config: EngineConfig, directory: Path) -> OpenVinoEngine:
    """Compile the graph for the config's static shapes. Raises EngineError where OpenVINO cannot."""
    return OpenVinoEngine(onnx, component, config)


class OpenVinoEngine:
    """Infer requests with static shapes: the fp32 angles, if any, then the rest; see `engines.spec.Engine`."""

    def __init__(self, onnx: Path, component: Component, config: EngineConfig) -> None:
        self.inputs: Mapping[str, TensorSpec] = resolve(component.inputs, config)
        self.outputs: Mapping[str, TensorSpec] = resolve(component.outputs, config)
        self._onnx = onnx
        self._dtype = component.dtype
        self._config = config
        self._changed: dict[str, np.ndarray] = {}
        self._buffers: dict[str, np.ndarray] = {}
        self._requests = self._compile({})

    def bind(self, buffers: Mapping[str, Any]) -> None:
        check_names(buffers, {**self.inputs, **self.outputs})
        for name, spec in {**self.inputs, **self.outputs}.items():
            check_array(spec, buffers[name])
        self._buffers = dict(buffers)  # keeps the memory alive while its address is bound
        tensor = _vendor().Tensor
        with _errors("bind"):
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

    def refit(self, weights: Mapping[str, np.ndarray]) -> None:
        changed = {**self._changed, **convert(self._onnx, weights)}
        self._requests = self._compile(changed)
        self._changed = changed
        if self._buffers:
            self.bind(self._buffers)

    def _compile(self, changed: Mapping[str, np.ndarray]) -> list[Any]:
        core = _vendor().Core()
        with _errors(f"compile {self._onnx}"):
            model = core.read_model(self._onnx)
            if changed:
                _replace(model, changed)
            if self._dtype != "fp32":
                _widen(model)
            model.reshape({name: list(spec.shape) for name, spec in self.inputs.items()})
            self._check(model)
            angles = _cut_angles(model) if self._config.dtype != "fp32" else None
            body = core.compile_model(model, "CPU", self._properties(self._config.dtype)).create_infer_request()
            if angles is None:
                return [body]
            first = core.compile_model(angles, "CPU", self._properties("fp32")).create_infer_request()
            for port in first.get_compiled_model().outputs:
                body.set_tensor(port.get_any_name(), first.get_tensor(port))
            return [first, body]

    def _properties(self, dtype: str) -> dict[str, Any]:
        properties: dict[str, Any] = {"INFERENCE_PRECISION_HINT": PRECISION[dtype], "NUM_STREAMS": 1,
                                      "PERFORMANCE_HINT": "LATENCY"}
        if dtype == "fp32":
            properties["EXECUTION_MODE_HINT"] = "ACCURACY"
        if self._config.threads:
            properties["INFERENCE_NUM_THREADS"] = self._config.threads
        return {**properties, **self._config.options}

    def _check(self, model: Any) -> None:
        for kind, ports, specs in (("inputs", model.inputs, self.inputs), ("outputs", model.outputs, self.outputs)):
            shapes = {port.get_any_name(): port.get_partial_shape() for port in ports}
            found = {name: tuple(s.to_shape()) if s.is_static else str(s) for name, s in shapes.items()}
            expected = {name: spec.shape for name, spec in specs.items()}
            if found != expected:
                raise EngineError(f"graph {kind}: got {found}, expected {expected} as the manifest says; "
                                  "export the bundle again")


def _cut_angles(model: Any) -> Any:
    """Take the sines and cosines of inputs out of `model`; returns the model that computes them, None without any.

    before   timestep ─▶ Multiply ─▶ Sin ─▶ MatMul …
    after    timestep ─▶ Multiply ─▶ Sin ─▶ "angle0"  (returned)      "angle0" ─▶ MatMul …  (`model`)
    """
    ov = _vendor()
    apart = model.clone()
    results: list[Any] = []
    twins = {op.get_friendly_name(): op for op in apart.get_ordered_ops()}
    used: set[str] = set()
    for op in [op for op in model.get_ordered_ops() if op.get_type_name() in ("Sin", "Cos")]:
        twin = twins[op.get_friendly_name()]
        above = _above(twin)
        if any(node.get_type_name() in ("MatMul", "Convolution") for node in above):
            continue
        name = f"angle{len(results)}"
        handed = ov.opset13.parameter(list(op.get_output_shape(0)), op.get_output_element_type(0), name=name)
        handed.output(0).get_tensor().set_names({name})
        op.output(0).replace(handed.output(0))
        model.add_parameters([handed])
        result = ov.opset13.result(twin.output(0))
        twin.output(0).get_tensor().set_names({name})
        results.append(result)
        used |= {node.get_friendly_name() for node in above}
    if not results:
        return None
    for parameter in list(model.get_parameters()):
        if not parameter.output(0).get_target_inputs():
            model.remove_parameter(parameter)
    return ov.Model(results, [p for p in apart.get_parameters() if p.get_friendly_name() in used], "angles")


def _above(node: Any) -> list[Any]:
    """Every node that `node` depends on."""
    found: dict[str, Any] = {}
    todo = [value.get_node() for value in node.input_values()]
    while todo:
        node = todo.pop()
        if node.get_friendly_name() not in found:
            found[node.get_friendly_name()] = node
            todo += [value.get_node() for value in node.input_values()]
    return list(found.values())


def _names(compiled: Any) -> set[str]:
    return {name for port in (*compiled.inputs, *compiled.outputs) for name in port.get_names()}


def _replace(model: Any, weights: Mapping[str, np.ndarray]) -> None:
    """Put new values in place of the constants that the ONNX reader named after initializers."""
    ov = _vendor()
    constants = {op.get_friendly_name(): op for op in model.get_ops() if op.get_type_name() == "Constant"}
    for name, value in weights.items():
        if (old := constants.get(name)) is None:
            raise EngineError(f"refit: OpenVINO folded weight {name!r} away; use --backend onnxruntime to change it")
        new = ov.op.Constant(ov.Tensor(value, ov.Shape(value.shape), old.get_element_type()))
        old.output(0).replace(new.output(0))


def _widen(model: Any) -> None:
    """Make a 16-bit graph compute in float32: every conversion to 16 bits, and every 16-bit weight, gives float32."""
    opset = _vendor().opset13
    for op in model.get_ordered_ops():
        if not op.get_output_size() or op.get_output_element_type(0).to_string() not in ("f16", "bf16"):
            continue
        if op.get_type_name() == "Convert":
            op.output(0).replace(opset.convert(op.input_value(0), "f32").output(0))
        elif op.get_type_name() == "Constant":
            users = list(op.output(0).get_target_inputs())
            wide = opset.convert(op, "f32")
            for user in users:
                user.replace_source_output(wide.output(0))
    model.validate_nodes_and_infer_types()


def _vendor() -> Any:
    try:
        import openvino
    except ModuleNotFoundError as e:
        raise EngineError(f"backend openvino: the package is missing; run: {PIP}") from e
    except ImportError as e:
        if isinstance(e.__cause__, KeyboardInterrupt):  # Ctrl-C while its library was being loaded
            raise e.__cause__ from None
        raise EngineError(f"backend openvino: the package does not load: {e}; install it again: {PIP}") from e
    return openvino


@contextlib.contextmanager
def _errors(what: str) -> Iterator[None]:
    """Turn OpenVINO's RuntimeError into EngineError (itself one, passed on as it is)."""
    try:
        yield
    except EngineError:
        raise
    except (RuntimeError, ValueError, TypeError) as e:
        raise EngineError(f"openvino could not {what}: {e}") from e
