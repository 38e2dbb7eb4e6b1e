"""TensorRT in two flavours: `tensorrt` builds on the GPU that will run it, `tensorrt-rtx` for an RTX GPU anywhere.

Both read the canonical ONNX graph, its dimensions fixed to the config's, and are strongly typed: an engine computes in
the precision of its graph. `engines/tensorrt/choice.py` builds, with our kernels or without; `engine.py` runs.

Options: attention, norm = ours, vendor (TensorRT's kernels) or auto, the default, which times both (TensorRT-RTX has
vendor only); refit=true keeps the weights replaceable (TensorRT's REFIT); stripped=true leaves them out of the plan and
reads them from the ONNX file at load (STRIP_PLAN, with REFIT_IDENTICAL unless refit is asked for);
optimization_level=0…5; workspace=MiB.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

from engines.backend import Backend, Target
from engines.check.tolerance import TOLERANCE
from engines.machine.gpu import Gpu, gpus
from engines.spec import EngineConfig, EngineError, TensorSpec
from engines.store import sources
from engines.store.places import user_cache
from engines.tensorrt import choice, record, vendor
from engines.tensorrt.build import BuildRequest
from engines.tensorrt.engine import TensorRtEngine
from engines.tensorrt.options import KINDS, Options


@dataclass(frozen=True)
class Flavour(Backend):
    """A flavour is one of the two; see `engines.backend.Backend`. name: of `engines.tensorrt.vendor.PIP`."""

    name: str
    on_gpu: ClassVar[bool] = True  # type: ignore[misc]

    @property
    def rtx(self) -> bool:
        """Return whether it is TensorRT-RTX."""
        return self.name == vendor.RTX

    def available(self) -> str | None:
        try:
            vendor.package(self.name)
        except EngineError as e:
            return str(e)
        if not self.rtx and not gpus():
            return (f"backend {self.name}: got no NVIDIA GPU, expected the one that will run the engines; "
                    "build there, or use tensorrt-rtx for an RTX GPU")
        return None

    def devices(self) -> list[str]:
        return [*(f"cuda:{number}" for number in range(len(gpus()))), *(self._architectures() if self.rtx else ())]

    def dtypes(self) -> tuple[str, ...]:
        """Return the precisions that a graph may have, the one to prefer first."""
        return ("fp16", "bf16", "fp32")

    def versions(self, config: EngineConfig | None = None) -> dict[str, str]:
        found = {self.name: vendor.package(self.name).__version__}
        if config is None:
            return found
        arch, number = self._place(config)
        here = {} if self.rtx or number is None else dataclasses.asdict(gpus()[number])
        asked = Options.read(config.options).asked(self.name)
        kernels = {"kernels": _kernels()} if set(asked.values()) != {"vendor"} else {}
        return {**found, "arch": arch, **here, **kernels}

    def runnable(self, config: EngineConfig) -> str | None:
        arch, number = self._place(config)
        return None if number is not None else (
            f"got {', '.join(g.arch for g in gpus()) or 'no NVIDIA GPU'} here, expected {arch}; "
            "on a machine that has one, run: python -m engines verify BUNDLE")

    def reads_onnx(self, config: EngineConfig) -> bool:
        """Return whether the plan is stripped: its weights are in the ONNX file then."""
        return Options.read(config.options).stripped

    def refits(self, config: EngineConfig) -> bool:
        return Options.read(config.options).refit

    def build(self, target: Target, directory: Path) -> None:
        """Write the plan and what its builder said. Raises EngineError for a graph or config that TensorRT refuses."""
        config, component = target.config, target.component
        options = Options.read(config.options)
        arch, number = self._place(config)
        if config.dtype != component.dtype:
            raise EngineError(f"{self.name}: got dtype {config.dtype}, expected {component.dtype}, that of the graph; "
                              f"pass --dtype {component.dtype}, or export the checkpoint with --dtype {config.dtype}")
        if not self.rtx and number is None:
            raise EngineError(f"{self.name} builds where the engine runs: {self.runnable(config)}")
        asked = options.asked(self.name)
        cache = "" if self.rtx or number is None else str(self._cache("timing", gpus()[number]))
        request = BuildRequest(
            self.name, str(target.onnx), _shapes(target.inputs), _shapes(target.outputs), str(directory), arch, number,
            tf32=config.dtype != "fp32", flags=options.flags, optimization_level=options.optimization_level,
            workspace=options.workspace, timing_cache=cache, tolerance=2 * TOLERANCE[config.dtype])
        choice.build(request, {kind: wanted for kind, wanted in asked.items() if component.sites.get(KINDS[kind])})

    def load(self, target: Target, directory: Path) -> TensorRtEngine:
        """Open the plan on its GPU. Raises EngineError where there is none, or TensorRT refuses the plan."""
        number = self._place(target.config)[1]
        if number is None:
            raise EngineError(f"{directory.name} does not run on this machine: {self.runnable(target.config)}")
        key = json.dumps([target.component.files, target.config.to_json()], sort_keys=True)
        compiled = self._cache(hashlib.sha256(key.encode()).hexdigest()[:12], gpus()[number]) if self.rtx else None
        return TensorRtEngine(vendor.package(self.name), target, directory, number, compiled)

    def details(self, directory: Path) -> dict[str, Any]:
        """Return the record of the build (`engines.tensorrt.record.read`). Raises EngineError for a damaged one."""
        try:
            return record.read(directory)
        except (OSError, ValueError) as e:
            raise EngineError(f"{directory / record.ABOUT} cannot be read ({e}); build the engine again: python -m "
                              f"engines build BUNDLE --backend {self.name} --rebuild") from e

    def _place(self, config: EngineConfig) -> tuple[str, int | None]:
        """Return the architecture of a config's device, and the number of the GPU of this machine that has it."""
        number: int | None
        here = gpus()
        if found := re.fullmatch(r"cuda(?::(\d+))?", config.device):
            number = int(found[1] or 0)
            if number >= len(here):
                raise EngineError(f"{self.name}: got device {config.device} on a machine of {len(here)} NVIDIA GPUs, "
                                  "expected one of its own" + (" or an architecture such as sm_89" if self.rtx else "")
                                  + "; pass --device, or --gpu when exporting")
            arch = here[number].arch
        elif re.fullmatch(r"sm_\d+", config.device):
            arch = config.device
            number = next((n for n, gpu in enumerate(here) if gpu.arch == arch), None)
        else:
            raise EngineError(f"{self.name}: got device {config.device!r}, expected cuda:N or an architecture such as "
                              "sm_89; pass --device, or --gpu when exporting")
        if self.rtx and arch not in self._architectures():
            raise EngineError(f"{self.name}: got {arch}, expected one of {', '.join(self._architectures())}; "
                              "use --backend tensorrt on that GPU")
        return arch, number

    def _architectures(self) -> list[str]:
        return vendor.architectures(vendor.package(self.name))

    def _cache(self, what: str, gpu: Gpu) -> Path:
        """Return the place of a file of this user's for one GPU, driver and library."""
        words = "-".join((gpu.name, gpu.arch, hashlib.sha256(gpu.driver.encode()).hexdigest()[:8], what))
        return user_cache() / f"{self.name}-{vendor.package(self.name).__version__}" / re.sub(r"[^\w.-]+", "_", words)


RTX = Flavour(vendor.RTX)
ENTERPRISE = Flavour(vendor.ENTERPRISE)


def _shapes(specs: dict[str, TensorSpec]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(int(d) for d in spec.shape) for name, spec in specs.items()}


def _kernels() -> str:
    """Return a hash of the folder of our kernels, of what its files import, and of the compiler's version.

    The build imports a kernel's file by its name, so that the imports of this folder do not lead there.
    """
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    files = dict(sources.hashes("kernels.triton"))
    return hashlib.sha256(json.dumps([triton, files], sort_keys=True).encode()).hexdigest()[:12]
