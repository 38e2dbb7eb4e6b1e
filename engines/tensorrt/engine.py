"""A TensorRT plan, opened on its GPU."""

from __future__ import annotations

import logging
import mmap
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.backend import Engine, Target
from engines.machine.buffers import check_names, device_address
from engines.machine.gpu import Memory, select
from engines.onnx.initializers import convert
from engines.onnx.low_rank import Weight
from engines.spec import EngineError, TensorSpec
from engines.tensorrt.options import Options
from engines.tensorrt.record import PLAN, write_whole
from engines.tensorrt.vendor import dims, log

if TYPE_CHECKING:
    import tensorrt as rt

logger = logging.getLogger(__name__)

ALIGNMENT = 256
"""Bytes that the address of working memory is a multiple of (`IExecutionContext.set_device_memory`)."""


class TensorRtEngine(Engine):
    """A plan opened on GPU number `gpu`; see `engines.backend.Engine`.

    A run needs `workspace_bytes` of working memory, which may be shared with engines that do not run meanwhile: hand it
    over with `use_workspace`. Otherwise `bind` allocates it. `enqueue` only launches, so that it can be captured.
    compiled: file for the kernels that TensorRT-RTX compiles when it opens a plan; None for TensorRT, which does not.
    """

    def __init__(self, trt: Any, target: Target, directory: Path, gpu: int, compiled: Path | None) -> None:
        self.inputs: Mapping[str, TensorSpec] = target.inputs
        self.outputs: Mapping[str, TensorSpec] = target.outputs
        self.gpu: int = gpu
        self._trt, self._onnx, self._log = trt, target.onnx, log(trt)
        self._changed: dict[str, np.ndarray] = {}
        self._buffers: dict[str, Any] = {}
        select(gpu)
        self._runtime: rt.Runtime = trt.Runtime(self._log)
        with open(directory / PLAN, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            engine: rt.ICudaEngine | None = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(f"{directory / PLAN} does not open: {self._log.why()}")
        self._engine = engine
        self._check(directory)
        if Options.read(target.config.options).stripped:
            refitter: rt.Refitter = trt.Refitter(engine, self._log)
            if not trt.OnnxParserRefitter(refitter, self._log).refit_from_file(str(target.onnx)):
                raise EngineError(f"{directory / PLAN} does not take its weights from {target.onnx}: {self._log.why()}")
        self.workspace_bytes: int = engine.device_memory_size_v2
        self._workspace: Any = None
        self.refittable: list[str] = trt.Refitter(engine, self._log).get_all_weights() if engine.refittable else []
        self._context = self._open(compiled)
        self._context.nvtx_verbosity = trt.ProfilingVerbosity.NONE

    def use_workspace(self, buffer: Any) -> None:
        """Take working memory of at least `workspace_bytes`: its address, a multiple of 256, or a cuda.core Buffer.

        It must stay where it is while the engine or a graph that captured it runs. Raises EngineError for a Buffer that
        is too small, or another address.
        """
        size = self.workspace_bytes
        memory = device_address(TensorSpec("workspace", "uint8", (size,)), buffer)
        if memory % ALIGNMENT:
            raise EngineError(f"workspace: got address {memory:#x}, expected a multiple of {ALIGNMENT}")
        self._context.set_device_memory(memory, size)
        self._workspace = buffer

    def bind(self, buffers: Mapping[str, Any]) -> None:
        if self._workspace is None and self.workspace_bytes:
            self.use_workspace(Memory(self.gpu, self.workspace_bytes))
        specs = {**self.inputs, **self.outputs}
        check_names(buffers, specs)
        for name, spec in specs.items():
            if not self._context.set_tensor_address(name, device_address(spec, buffers[name])):
                raise EngineError(f"bind {name}: {self._log.why()}")
        self._buffers = dict(buffers)  # keeps the memory alive while its address is bound

    def enqueue(self, stream: Any = None) -> None:
        if not self._buffers:
            raise EngineError("enqueue: no buffers are bound; call bind first")
        address = 0 if stream is None else int(getattr(stream, "handle", stream))  # a number, or cuda.core's Stream
        if not self._context.execute_async_v3(address):
            raise EngineError(f"enqueue: {self._log.why()}")

    def refit(self, weights: Mapping[str, Weight]) -> None:
        """See `engines.backend.Engine`; needs the option refit=true, and that nothing is running.

        NVIDIA documents for TensorRT 11.3 that a plan built so may drop the bias of a matrix product. The build checks
        that (`engines/check/refit.py`); values given here are not checked again.
        """
        changed = {**self._changed, **convert(self._onnx, weights)}
        if not self._engine.refittable:
            raise EngineError("refit: this engine keeps its weights; build it with --option refit=true")
        refitter: rt.Refitter = self._trt.Refitter(self._engine, self._log)
        if fixed := sorted(set(changed) - set(refitter.get_all_weights())):
            raise EngineError(f"refit: got {', '.join(fixed[:3])}, which the build has folded away; build it again")
        for name, value in changed.items():
            kind = refitter.get_weights_prototype(name).dtype
            if not refitter.set_named_weights(name, self._trt.Weights(kind, value.ctypes.data, value.size)):
                raise EngineError(f"refit {name}: {self._log.why()}")
        if missing := refitter.get_missing_weights():
            raise EngineError(f"refit: got {', '.join(sorted(changed))}, expected {', '.join(sorted(missing))} too: "
                              "TensorRT has merged them")
        if not refitter.refit_cuda_engine():
            raise EngineError(f"refit: {self._log.why()}")
        self._changed = changed

    def _check(self, directory: Path) -> None:
        engine, trt = self._engine, self._trt
        for n in range(engine.num_io_tensors):
            name = engine.get_tensor_name(n)
            specs = self.inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else self.outputs
            found = (np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name, dims(engine.get_tensor_shape(name)))
            expected = (specs[name].dtype, specs[name].shape) if name in specs else "no such tensor"
            if found != expected:
                raise EngineError(f"{directory / PLAN}: {name}: got {found}, expected {expected}; build it again")

    def _open(self, compiled: Path | None) -> rt.IExecutionContext:
        """Return an execution context without memory. What TensorRT-RTX compiles for it, the next process reads."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context: rt.IExecutionContext | None
        if compiled is None:
            context = self._engine.create_execution_context(strategy)
        else:
            settings: Any = self._engine.create_runtime_config()  # the stubs' has no cache: TensorRT-RTX alone does
            settings.set_execution_context_allocation_strategy(strategy)
            cache = settings.create_runtime_cache()
            if compiled.is_file() and not cache.deserialize(compiled.read_bytes()):
                logger.info("%s is of another driver or version; kernels are compiled again", compiled)
            settings.set_runtime_cache(cache)
            context = self._engine.create_execution_context(settings)
            weakref.finalize(self, lambda: write_whole(compiled, cache.serialize()))
        if context is None:
            raise EngineError(f"no execution context: {self._log.why()}")
        return context
