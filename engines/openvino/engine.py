"""A component compiled by OpenVINO for this CPU.

Under a 16-bit precision hint the plugin rounds the timestep itself (999 becomes 1000 in bfloat16) and the angles whose
sine and cosine embed it. So the part that leads to a sine or cosine is compiled apart, in fp32, and hands its few
numbers over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engines.backend import Engine, Target
from engines.machine.buffers import check_array, check_names
from engines.machine.vendor import errors
from engines.onnx.initializers import refitted
from engines.onnx.low_rank import Weight
from engines.openvino import extension, vendor
from engines.openvino.options import Options
from engines.openvino.passes.angles import cut_angles
from engines.openvino.passes.attention import replace_attention
from engines.openvino.passes.bfloat16 import narrow
from engines.openvino.passes.gates import fold_halves, halve_gates
from engines.openvino.passes.group_norm import replace_group_norm
from engines.openvino.passes.weights import replace_weights
from engines.openvino.passes.widen import widen
from engines.spec import EngineError, TensorSpec

PRECISION = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
"""A config's dtype → the plugin's word for it."""
REPLACE = {"attention": replace_attention, "norm": replace_group_norm}
"""Kind of site → the pass that puts our operator in the graph."""


class OpenVinoEngine(Engine):
    """Infer requests with static shapes: the fp32 angles, if any, then the rest; see `engines.backend.Engine`.

    counters: have every layer timed, which costs time itself; `counters()` then has the figures of the last call.
    """

    def __init__(self, target: Target, counters: bool = False) -> None:
        self.inputs: Mapping[str, TensorSpec] = target.inputs
        self.outputs: Mapping[str, TensorSpec] = target.outputs
        self._onnx = target.onnx
        self._config = target.config
        self._options = Options.read(target.config)
        self._counters = counters
        self._buffers: dict[str, np.ndarray] = {}
        self._models = self._read(target.component.dtype)  # the compiled ones hold the memory of their constants too
        self._requests = self._start(self._models)

    def bind(self, buffers: Mapping[str, Any]) -> None:
        check_names(buffers, {**self.inputs, **self.outputs})
        for name, spec in {**self.inputs, **self.outputs}.items():
            check_array(spec, buffers[name])
        self._buffers = dict(buffers)  # keeps the memory alive while its address is bound
        tensor = vendor.package().Tensor
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
            changed = set[str]().union(*(replace_weights(vendor.package(), model, weights, known) for model in models))
            if lost := sorted(set(weights) - changed):
                raise EngineError(f"refit: OpenVINO folded weight {lost[0]!r} away; use --backend onnxruntime to "
                                  "change it")
            requests = self._start(models)
        self._models, self._requests = models, requests
        if self._buffers:
            self.bind(self._buffers)

    def counters(self) -> list[Any]:
        """Return openvino.ProfilingInfo of the layers that the last call executed, in their order."""
        return [node for request in self._requests for node in request.get_profiling_info()
                if node.status == node.Status.EXECUTED]

    def _read(self, dtype: str) -> list[Any]:
        """Return the models to compile, in the order to run: the angles, if any, and the rest.

        Constants keep their names, by which `refit` finds them. dtype: of the graph.
        """
        ov, ours = vendor.package(), self._options.ours
        core = ov.Core()
        with errors(f"openvino could not compile {self._onnx}"):
            model = core.read_model(self._onnx)
            if dtype != "fp32":
                widen(ov, model)
            model.reshape({name: list(spec.shape) for name, spec in self.inputs.items()})
            self._check(model)
            for kind, replace in REPLACE.items():
                if kind in ours:
                    extension.add_to(core)
                    replace(ov, model, extension.maker(extension.OPS[kind]))
            angles = cut_angles(ov, model) if self._config.dtype != "fp32" else None
            if ours:
                halve_gates(ov, model)
                if self._config.dtype == "bf16":
                    narrow(ov, model)
                fold_halves(ov, model)
        return [model] if angles is None else [angles, model]

    def _start(self, models: Sequence[Any]) -> list[Any]:
        """Compile `models`; return a request of each, those of the angles connected to that of the rest."""
        core = vendor.package().Core()
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
        return {**properties, **self._options.properties}

    def _check(self, model: Any) -> None:
        for kind, ports, specs in (("inputs", model.inputs, self.inputs), ("outputs", model.outputs, self.outputs)):
            shapes = {port.get_any_name(): port.get_partial_shape() for port in ports}
            found = {name: tuple(s.to_shape()) if s.is_static else str(s) for name, s in shapes.items()}
            expected = {name: spec.shape for name, spec in specs.items()}
            if found != expected:
                raise EngineError(f"graph {kind}: got {found}, expected {expected} as the manifest says; "
                                  "export the bundle again")


def _names(compiled: Any) -> set[str]:
    return {name for port in (*compiled.inputs, *compiled.outputs) for name in port.get_names()}
