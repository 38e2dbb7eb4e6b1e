"""PyTorch's own compiler, ahead of time: the graph as a torch module, torch.export, an AOTInductor package.

A package holds code for one processor or GPU architecture and no weights: those are read from the bundle's ONNX file
when it is opened, into memory that the package is told of, and a refit writes them there in place. Nothing is compiled
when it is opened; building needs a C++ compiler.

On a GPU attention, group norm with SiLU, layer norm and GEGLU can be our Triton kernels, compiled into the package; on
a CPU the first two can be our C++ kernels, which the package calls through Python. Projections that read the same value
are one product, convolutions have their channels last.
Options: attention, norm, layer_norm, geglu = ours, vendor (PyTorch's), or auto, which times both at every site; fp8 =
linear, for linear layers in float8 (`engines/inductor/torch/fp8.py`), and fp8_least, how large they are at least;
fuse = false keeps projections apart; max_autotune = false, on a GPU, does not time Triton's convolutions and products
against cuDNN's and cuBLAS's.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

from engines.backend import Backend, Target
from engines.inductor import device
from engines.inductor.engine import InductorEngine
from engines.inductor.options import Options, check_fp8
from engines.inductor.record import Record
from engines.machine.cpu import describe
from engines.machine.gpu import gpus
from engines.machine.vendor import errors
from engines.onnx import model as onnx_model
from engines.spec import EngineConfig, EngineError
from kernels.cpu import library


class Inductor(Backend):
    """AOTInductor as a backend."""

    name = "inductor"

    def available(self) -> str | None:
        if importlib.util.find_spec("torch") is None:
            return f"backend inductor: the package is missing; run: {device.PIP}"
        return None

    def devices(self) -> list[str]:
        torch = device.vendor()
        return ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count() if torch.version.cuda else 0))]

    def dtypes(self) -> tuple[str, ...]:
        return ("fp16", "fp32", "bf16") if len(self.devices()) > 1 else device.cpu_dtypes()

    def versions(self, config: EngineConfig | None = None) -> dict[str, str]:
        if reason := self.available():
            raise EngineError(reason)
        versions = {"inductor": importlib.metadata.version("torch")}
        if config is None:
            return versions
        if (number := device.gpu(config)) is None:
            ours = Options.read(config).ours
            return {**versions, **describe(), **({"kernels": library.fingerprint()} if ours else {})}
        return {**versions, **dataclasses.asdict(gpus()[number])}  # a version of PyTorch has one of Triton

    def build(self, target: Target, directory: Path) -> None:
        """Write the package, what its weights are, and its constants. Raises EngineError where that cannot be done."""
        options, number = Options.read(target.config), device.gpu(target.config)
        if options.fp8_least is not None and number is not None:
            check_fp8(gpus()[number].arch)
        here = device.cpu_dtypes() if number is None else ("fp16", "bf16", "fp32")
        if target.config.dtype not in here:
            raise EngineError(f"inductor: got dtype {target.config.dtype}, but {describe()['cpu']} computes in "
                              f"{', '.join(here)}; pass --dtype fp32")
        device.vendor()
        onnx_model.library("backend inductor")
        from engines.inductor.torch.build import build

        build(target, directory, options, number)

    def load(self, target: Target, directory: Path) -> InductorEngine:
        """Open the package and give it its weights. Raises EngineError where PyTorch cannot."""
        with errors(f"inductor could not open {directory}"):
            return InductorEngine(target, directory)

    def details(self, directory: Path) -> dict[str, Any]:
        """Return kernels, timings, failed and sites of a `Record`. Raises EngineError for a damaged file."""
        record = Record.read(directory)
        return {"kernels": record.kernels, "timings": record.timings, "failed": record.failed, "sites": record.sites}


INDUCTOR = Inductor()
