"""An opened AOTInductor package, which computes with weights that lie where a refit can write them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engines.backend import Engine, Target
from engines.inductor import device
from engines.inductor.record import CONSTANTS, PACKAGE, RECORD, Record
from engines.machine.buffers import check_array, check_names, device_address
from engines.machine.vendor import errors
from engines.onnx.initializers import convert, values
from engines.onnx.low_rank import Weight
from engines.spec import EngineError, TensorSpec


class InductorEngine(Engine):
    """A package opened on the CPU, or on the GPU of number `gpu`; see `engines.backend.Engine`.

    On a GPU it runs once when it is opened, so that its kernels are loaded, and the memory that it computes in belongs
    to it alone: a captured `enqueue` stays valid whatever else PyTorch allocates, and after a refit. precision: "fp8"
    with linear layers in that, else the config's.
    """

    def __init__(self, target: Target, directory: Path) -> None:
        torch = device.vendor()
        self.inputs: Mapping[str, TensorSpec] = target.inputs
        self.outputs: Mapping[str, TensorSpec] = target.outputs
        self.gpu = device.gpu(target.config)
        self._torch, self._onnx, self._config = torch, target.onnx, target.config
        self._device = device.name(self.gpu)
        self._buffers: dict[str, Any] = {}
        record = Record.read(directory)
        if record.cpp:
            import kernels.cpu.torch_ops  # noqa: F401  registers what the package calls
        self._order = (record.inputs, record.outputs)
        self._package = torch._inductor.aoti_load_package(
            str(directory / PACKAGE), run_single_threaded=True, device_index=-1 if self.gpu is None else self.gpu)
        self._give_weights(record, directory)
        self.precision = "fp8" if self._scales else target.config.dtype
        if self.gpu is not None:
            self._pool = torch.cuda.MemPool()
            self._run([torch.zeros(tuple(map(int, self.inputs[name].shape)), device=self._device,
                                   dtype=getattr(torch, self.inputs[name].dtype)) for name in self._order[0]], None, [])
            torch.cuda.synchronize(self.gpu)

    def _give_weights(self, record: Record, directory: Path) -> None:
        """Read the weights from the ONNX file into memory, and tell the package where they lie."""
        from engines.inductor.torch.weights import Weight as Parameter
        from engines.inductor.torch.weights import scales_name

        needed = self._package.get_constant_fqns()
        self._weights = {name: Parameter.from_json(weight) for name, weight in record.weights.items() if name in needed}
        self._scales = {name: weight.scales(self._device) for name, weight in self._weights.items()
                        if weight.dtype == "fp8"}
        self._memory = {name: weight.empty(self._device) for name, weight in self._weights.items()}
        self._memory |= {scales_name(name): scales for name, scales in self._scales.items()}
        stored = values(self._onnx)
        for name, weight in self._weights.items():
            self._write(name, {part: stored[part] for part in weight.names})
        with np.load(directory / CONSTANTS) as constants:
            self._memory |= {name: self._torch.from_numpy(constants[name]).to(self._device) for name in constants}
        if unknown := sorted(set(needed) - set(self._memory)):
            raise EngineError(f"{directory / PACKAGE}: got constants {unknown[:3]}, expected those of {RECORD}; this "
                              "version of PyTorch added some; build it again with the one before")
        self._package.load_constants({name: self._memory[name] for name in needed}, check_full_update=False,
                                     user_managed=True)  # it reads them where they are

    def bind(self, buffers: Mapping[str, Any]) -> None:
        specs = {**self.inputs, **self.outputs}
        check_names(buffers, specs)
        tensors = {name: self._tensor(spec, buffers[name]) for name, spec in specs.items()}
        self._buffers = dict(buffers)  # keeps the memory alive while its address is bound
        self._bound = [[tensors[name] for name in names] for names in self._order]

    def enqueue(self, stream: Any = None) -> None:
        if not self._buffers:
            raise EngineError("enqueue: no buffers are bound; call bind first")
        with errors("inductor could not run"):
            self._run(self._bound[0], stream, self._bound[1])

    def refit(self, weights: Mapping[str, Weight]) -> None:
        """See `engines.backend.Engine`. In place: what `enqueue` reads, captured or not. Nothing may be running."""
        changed = convert(self._onnx, weights)
        known = {part for weight in self._weights.values() for part in weight.names}
        if fixed := sorted(set(changed) - known):
            raise EngineError(f"refit: got {', '.join(fixed[:3])}, which the build has folded away; build it again")
        with errors("inductor could not refit"):
            for name, weight in self._weights.items():
                self._write(name, {part: changed[part] for part in weight.names if part in changed})
            if self.gpu is not None:
                self._torch.cuda.synchronize(self.gpu)

    def _run(self, inputs: list[Any], stream: Any, outputs: list[Any]) -> None:
        with self._on(stream):
            for output, result in zip(outputs, self._package.loader.run(inputs), strict=False):
                output.copy_(result)

    @contextlib.contextmanager
    def _on(self, stream: Any) -> Iterator[None]:
        """Run the package on `stream` of its GPU (the default one for None), or on as many threads as asked for."""
        torch = self._torch
        if self.gpu is None:
            if self._config.threads and torch.get_num_threads() != self._config.threads:
                torch.set_num_threads(self._config.threads)
            yield
            return
        handle = 0 if stream is None else int(getattr(stream, "handle", stream))  # a number, or cuda.core's Stream
        torchs = torch.cuda.ExternalStream(handle, self.gpu) if handle else torch.cuda.default_stream(self.gpu)
        with (torch.cuda.device(self.gpu), torch.cuda.stream(torchs), torch.cuda.use_mem_pool(self._pool, self.gpu),
              device.flags(self._config)):
            yield

    def _write(self, name: str, new: Mapping[str, np.ndarray]) -> None:
        """Write initializers, as the ONNX file stores them, into the weight that they are parts of."""
        torch, weight = self._torch, self._weights[name]
        for part, array in new.items():
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # it is only read
                value = torch.from_numpy(array)
            value = value.view(torch.bfloat16) if array.dtype == np.uint16 else value
            weight.write(self._memory[name], self._scales.get(name), part, value)

    def _tensor(self, spec: TensorSpec, buffer: Any) -> Any:
        if self.gpu is None:
            check_array(spec, buffer)
            return self._torch.from_numpy(buffer)
        return self._torch.as_tensor(_DeviceArray(spec, device_address(spec, buffer)), device=self._device)


class _DeviceArray:
    """Device memory of a spec, as PyTorch takes it over."""

    def __init__(self, spec: TensorSpec, address: int) -> None:
        self.__cuda_array_interface__ = {"shape": tuple(int(d) for d in spec.shape), "data": (address, False),
                                         "typestr": np.dtype(spec.dtype).str, "strides": None, "version": 3}
