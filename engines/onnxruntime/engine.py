"""A session of ONNX Runtime as an engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engines.backend import Engine, Target
from engines.machine.buffers import check_array, check_names, device_address
from engines.machine.cpu import physical_cores
from engines.machine.vendor import errors
from engines.onnx.initializers import BFLOAT16, convert, externalise, initializers
from engines.onnx.low_rank import Weight
from engines.onnxruntime.options import provider, vendor
from engines.spec import EngineError, TensorSpec

WIDENED = "widened.onnx"
"""The graph that computes in float32, in the engine's directory, where the bundle's is of 16 bits."""


class OnnxRuntimeEngine(Engine):
    """An engine is one session with static shapes; see `engines.backend.Engine`.

    On CUDA, `enqueue` runs on ONNX Runtime's own stream and returns when it is done, so it cannot be captured.
    profile: beginning of the name of a file that every node's times go to; `end_profile` closes it and returns its
    name.
    """

    def __init__(self, target: Target, directory: Path, profile: Path | None = None) -> None:
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
                    address = device_address(spec, buffers[name])
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
        """Close the profile and return the name of its file."""
        return str(self._session.end_profiling())

    def _open(self, changed: Mapping[str, np.ndarray] | None = None) -> Any:
        ort = vendor()
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
            return ort.InferenceSession(model, options, providers=[provider(self._config, self._cache)])


def _check_specs(session: Any, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]) -> None:
    for kind, values, specs in (("inputs", session.get_inputs(), inputs), ("outputs", session.get_outputs(), outputs)):
        names = {value.name for value in values}
        if names != set(specs):
            raise EngineError(f"graph {kind}: got {sorted(names)}, expected {sorted(specs)} as the manifest says; "
                              "export the bundle again")
        for value in values:
            fixed = zip(value.shape, specs[value.name].shape, strict=False)
            if len(value.shape) != len(specs[value.name].shape) or any(isinstance(g, int) and g != e for g, e in fixed):
                raise EngineError(f"graph {kind[:-1]} {value.name}: got shape {value.shape}, expected "
                                  f"{list(specs[value.name].shape)}; export the bundle again")


def _ort_value(ort: Any, kind: int, value: np.ndarray) -> Any:
    if kind == BFLOAT16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(value, BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(value)
