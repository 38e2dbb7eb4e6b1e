"""The engines of a bundle by static shape: loaded when they are first asked for, where they run, with their weights."""

from __future__ import annotations

import logging
import time

from engines import Bundle, Engine, EngineError, backend, store
from engines.machine.gpu import gpus
from engines.store.runtime_kernels import runtime_kernels
from kernels.aot.artefact import KernelError
from runtime.config import PipelineConfig
from runtime.devices.bound import BoundEngine
from runtime.devices.cuda import Cuda
from runtime.devices.device import Device
from runtime.devices.host import Host
from runtime.lora.application import Loras, Stack

logger = logging.getLogger(__name__)


class Shelf:
    """The bound engines of `bundle` for the settings of a pipeline."""

    def __init__(self, bundle: Bundle, config: PipelineConfig) -> None:
        self.bundle, self.config = bundle, config
        self.loras = Loras(bundle)
        self._host = Host()
        self._gpus: dict[int, Cuda] = {}
        self._engines: dict[tuple[str, int, tuple[int, int], int], BoundEngine] = {}

    def in_parts(self, network: str) -> bool:
        """Return whether a network runs in the parts of `export.passes.hoist`."""
        return store.in_parts(self.bundle, self.config.backend, network)

    def engine(self, component: str, rows: int, size: tuple[int, int] = (0, 0), tokens: int = 0,
               stack: Stack = ()) -> BoundEngine:
        """Return the engine of a component with the weights of `stack`, loaded (and built, where need be) at its first
        use.

        size: (height, width) in pixels, zeros where it has none. tokens: of the text, 0 for those of one prompt. Raises
        EngineError where it cannot be built or opened.
        """
        tokens = tokens or self.bundle.tokens
        key = (component, rows, size, tokens)
        if key not in self._engines:
            self._engines[key] = self._load(component, rows, size, tokens)
        return self.loras.fit(component, self._engines[key], stack)

    def _load(self, component: str, rows: int, size: tuple[int, int], tokens: int) -> BoundEngine:
        settings = self.config
        dtype = self.bundle.component(component).dtype if backend(settings.backend).on_gpu else settings.dtype
        config = self.bundle.config(component, backend=settings.backend, dtype=dtype, batch=rows, size=size,
                                    tokens=tokens, threads=settings.threads, device=settings.device,
                                    options=settings.options)
        start = time.perf_counter()
        engine = store.load(self.bundle, component, config)
        bound = BoundEngine(engine, self._place(engine))
        logger.info("%s %s ready in %.2f s", component, config.dims, time.perf_counter() - start)
        return bound

    def _place(self, engine: Engine) -> Device:
        """Return this host, or the GPU of the number that the engine says."""
        if engine.gpu is None:
            return self._host
        if engine.gpu not in self._gpus:
            try:
                arch = gpus()[engine.gpu].arch
                self._gpus[engine.gpu] = Cuda(engine.gpu, runtime_kernels(self.bundle, arch), self.config.eager)
            except KernelError as e:
                raise EngineError(str(e)) from e
        return self._gpus[engine.gpu]
