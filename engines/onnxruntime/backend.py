"""ONNX Runtime: the portable default and, in float32 on a CPU, the numerical reference of every other backend.

Sessions are made from the bundle's own ONNX file. An optimised copy of a 3.4 GB UNet opens in 3 s instead of 7 to 13 s
on two cores, but costs another 3.4 GB for every shape, so none is kept (`docs/engines.md` has the figures).
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engines.backend import Backend, Engine, Layer, Target
from engines.machine.buffers import check_array, check_names
from engines.machine.cpu import describe, physical_cores
from engines.machine.vendor import errors, importing
from engines.onnx.initializers import BFLOAT16, convert, externalise, initializers
from engines.onnx.low_rank import Weight
from engines.spec import EngineConfig, EngineError, TensorSpec

PIP = "pip install onnxruntime"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
WIDENED = "widened.onnx"


class OnnxRuntime(Backend):
    """ONNX Runtime as a backend."""

    name = "onnxruntime"

    def available(self) -> str | None:
        """None where it can be used, else what to do."""
        try:
            _vendor()
        except EngineError as e:
            return str(e)
        return None

    def devices(self) -> list[str]:
        found = _vendor().get_available_providers()
        return ["cpu", *(["cuda:0"] if PROVIDERS["cuda"] in found else [])]

    def dtypes(self) -> tuple[str, ...]:
        """Precisions this machine computes in, the one to prefer first."""
        return ("fp16", "fp32", "bf16") if "cuda:0" in self.devices() else ("fp32",)

    def versions(self, config: EngineConfig | None = None) -> dict[str, str]:
        """What a cached engine depends on beside files and config."""
        ort = _vendor()
        found = {"onnxruntime": ort.__version__}
        if config is None or config.device == "cpu":
            return {**found, **describe()}
        return {**found, "provider": _provider(config)[0], "build": ort.get_build_info(), "gpu": _gpu_name()}

    def build(self, target: Target, directory: Path) -> None:
        """Write what `load` needs beside the ONNX file into `directory`: a widened graph where the component is 16-bit."""
        _provider(target.config)
        if target.config.dtype not in ("fp32", target.component.dtype) or (target.config.device == "cpu" and target.config.dtype != "fp32"):
            raise EngineError(
                f"onnxruntime on {target.config.device}: got dtype {target.config.dtype} for a {target.component.dtype} graph, expected fp32"
                f"{'' if target.config.device == 'cpu' else ' or that of the graph'}; pass --dtype fp32"
                f"{', or --backend openvino where the CPU computes in 16 bits' if target.config.device == 'cpu' else ''}")
        if target.config.dtype == "fp32" and target.component.dtype != "fp32":
            from engines.onnx.widen import widen

            widen(target.onnx, directory / WIDENED)

    def load(self, target: Target, directory: Path) -> OnnxRuntimeEngine:
        """Open the engine that `build` made. Raises EngineError for a graph that the provider cannot run."""
        return OnnxRuntimeEngine(target, directory)

    def layers(self, target: Target, directory: Path, feed: Mapping[str, np.ndarray],
               calls: int) -> list[Layer]:
        """See `engines.backend.Backend`; on a CPU. The kernel is the provider's, which has one for each type of node."""
        with tempfile.TemporaryDirectory() as profiles:
            engine = OnnxRuntimeEngine(target, directory, Path(profiles) / "call")
            engine.bind({**feed, **{name: spec.empty() for name, spec in engine.outputs.items()}})
            for _ in range(calls + 1):
                engine.enqueue()
            events = json.loads(Path(engine.end_profile()).read_text(encoding="utf8"))
        nodes: dict[tuple[str, str], list[dict[str, Any]]] = {}  # fused nodes share a name
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                name = (event["name"].removesuffix("_kernel_time"), event["args"]["node_index"])
                nodes.setdefault(name, []).append(event)
        return [Layer(name, runs[0]["args"]["op_name"], runs[0]["args"]["provider"].removesuffix("ExecutionProvider"),
                      ", ".join(kind for out in runs[0]["args"].get("output_type_shape", ())[:1] for kind in out),
                      float(np.median([run["dur"] for run in runs[1:]])) / 1e6 if calls else None)
                for (name, _), runs in nodes.items()]


ONNXRUNTIME = OnnxRuntime()


class OnnxRuntimeEngine(Engine):
    """One session with static shapes; see `engines.backend.Engine`.

    On CUDA, `enqueue` runs on ONNX Runtime's own stream and returns when it is done, so it cannot be captured.
    profile: how the name of a file begins that every node's times go to; `end_profile` closes it and returns its name.
    """

    def __init__(self, target: Target, directory: Path,
                 profile: Path | None = None) -> None:
        self.inputs: Mapping[str, TensorSpec] = target.inputs
        self.outputs: Mapping[str, TensorSpec] = target.outputs
        widened = directory / WIDENED
        self._model = widened if widened.is_file() else target.onnx
        self._weights = target.onnx.parent
        self._config = target.config
        self._cache = directory
        self._profile = profile
        self._changed: dict[str, np.ndarray] = {}
        self._buffers: dict[str, Any] = {}
        self._session = self._open()
        _check_specs(self._session, self.inputs, self.outputs)

    def bind(self, buffers: Mapping[str, Any]) -> None:
        check_names(buffers, {**self.inputs, **self.outputs})
        binding = self._session.io_binding()
        device, _, number = self._config.device.partition(":")
        for specs, bind in ((self.inputs, binding.bind_input), (self.outputs, binding.bind_output)):
            for name, spec in specs.items():
                if device == "cpu":
                    check_array(spec, buffers[name])
                    address = buffers[name].ctypes.data
                else:
                    address = _device_address(spec, buffers[name])
                bind(name, device, int(number or 0), np.dtype(spec.dtype), spec.shape, address)
        self._buffers = dict(buffers)  # keeps the memory alive while its address is bound
        self._binding = binding

    def enqueue(self, stream: Any = None) -> None:
        if not self._buffers:
            raise EngineError("enqueue: no buffers are bound; call bind first")
        self._session.run_with_iobinding(self._binding)

    def refit(self, weights: Mapping[str, Weight]) -> None:
        changed = {**self._changed, **convert(self._model, weights)}
        self._session = self._open(changed)
        self._changed = changed
        if self._buffers:
            self.bind(self._buffers)

    def end_profile(self) -> str:
        return str(self._session.end_profiling())

    def _open(self, changed: Mapping[str, np.ndarray] | None = None) -> Any:
        ort = _vendor()
        options = ort.SessionOptions()
        for name, value in self._config.dims.items():
            options.add_free_dimension_override_by_name(name, value)
        options.intra_op_num_threads = self._config.threads or physical_cores()
        options.log_severity_level = 3
        if self._profile:
            options.enable_profiling = True
            options.profile_file_prefix = str(self._profile)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._weights))
        model = self._model.read_bytes()
        if changed:
            known = initializers(model)
            model = externalise(model, [n for n in changed if not known[n].external])
            values = [_ort_value(ort, known[n].type, w) for n, w in changed.items()]
            options.add_external_initializers(list(changed), values)
        with errors(f"onnxruntime could not run {self._model}"):
            return ort.InferenceSession(model, options, providers=[_provider(self._config, self._cache)])


def _vendor() -> Any:
    with importing("onnxruntime", PIP):
        import onnxruntime
    return onnxruntime


def _provider(config: EngineConfig, cache: Path | None = None) -> tuple[str, dict[str, str]]:
    if unknown := set(config.options) - {"provider"}:
        raise EngineError(f"onnxruntime: got unknown options {sorted(unknown)}, expected only 'provider'")
    device, _, number = config.device.partition(":")
    if device not in ("cpu", "cuda") or (device == "cpu" and number) or (number and not number.isdigit()):
        raise EngineError(f"onnxruntime: got device {config.device!r}, expected cpu, cuda or cuda:N")
    name = config.options.get("provider", device)
    if name not in PROVIDERS or (name == "cpu") != (device == "cpu"):
        raise EngineError(f"onnxruntime on {config.device}: got provider {name!r}, expected "
                          f"{'cpu' if device == 'cpu' else 'cuda or tensorrt'}")
    if PROVIDERS[name] not in _vendor().get_available_providers():
        raise EngineError(f"onnxruntime: this build has no {PROVIDERS[name]}; run: pip install onnxruntime-gpu")
    if name == "cpu":
        return PROVIDERS[name], {}
    options = {"device_id": number or "0"}
    if name == "cuda":
        options["use_tf32"] = "0" if config.dtype == "fp32" else "1"
    elif cache is not None:
        options |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache)}
    return PROVIDERS[name], options


def _check_specs(session: Any, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]) -> None:
    for kind, found, specs in (("inputs", session.get_inputs(), inputs), ("outputs", session.get_outputs(), outputs)):
        names = {value.name for value in found}
        if names != set(specs):
            raise EngineError(f"graph {kind}: got {sorted(names)}, expected {sorted(specs)} as the manifest says; "
                              "export the bundle again")
        for value in found:
            fixed = zip(value.shape, specs[value.name].shape, strict=False)
            if len(value.shape) != len(specs[value.name].shape) or any(isinstance(g, int) and g != e for g, e in fixed):
                raise EngineError(f"graph {kind[:-1]} {value.name}: got shape {value.shape}, expected "
                                  f"{list(specs[value.name].shape)}; export the bundle again")


def _ort_value(ort: Any, kind: int, value: np.ndarray) -> Any:
    if kind == BFLOAT16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(value, BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(value)


def _device_address(spec: TensorSpec, buffer: Any) -> int:
    """Address of device memory: an object with `handle` and `size` (cuda.core.Buffer)."""
    needed = math.prod(int(d) for d in spec.shape) * np.dtype(spec.dtype).itemsize
    if not hasattr(buffer, "handle") or getattr(buffer, "size", 0) < needed:
        raise EngineError(f"bind {spec.name}: got {type(buffer).__name__}, expected a cuda.core Buffer of "
                          f"at least {needed} bytes ({spec.dtype} {list(spec.shape)})")
    return int(buffer.handle)


def _gpu_name() -> str:
    """Name and driver of the GPUs; ONNX Runtime itself tells neither."""
    files = sorted(Path("/proc/driver/nvidia").glob("gpus/*/information"))
    lines = [line for f in files for line in f.read_text().splitlines() if line.startswith("Model")]
    version = Path("/proc/driver/nvidia/version")
    return "; ".join([*lines, version.read_text().splitlines()[0] if version.is_file() else "no driver found"])
