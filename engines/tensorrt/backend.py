"""TensorRT in two flavours: `tensorrt` builds on the GPU that will run it, `tensorrt-rtx` for an RTX GPU anywhere.

Both read the canonical ONNX graph, its dimensions fixed to the config's, and are strongly typed: an engine computes in
the precision of its graph. `engines/tensorrt/choice.py` builds, with our kernels or without; what is here describes,
loads and runs.

Options: attention=native|plugin|auto and norm=native|plugin|auto choose between TensorRT's kernels and ours, auto, the
default, by timing both (TensorRT-RTX has native only); refit=true keeps the weights replaceable (TensorRT's REFIT);
stripped=true leaves them out of the plan and reads them from the ONNX file at load (STRIP_PLAN, with REFIT_IDENTICAL
unless refit is asked for); optimization_level=0…5; workspace=MiB.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import mmap
import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

import kernels
from engines.backend import Backend, Engine, Target
from engines.bundle import hash_files
from engines.check.tolerance import TOLERANCE
from engines.machine.buffers import check_names, device_address
from engines.machine.gpu import Gpu, Memory, gpus, select
from engines.machine.vendor import importing
from engines.onnx.initializers import convert
from engines.onnx.low_rank import Weight
from engines.spec import EngineConfig, EngineError, TensorSpec
from engines.store.places import user_cache
from engines.tensorrt.build import ABOUT, KINDS, PLAN, Request, dims, logger, write_whole
from engines.tensorrt.choice import build

if TYPE_CHECKING:
    import tensorrt as rt

log = logging.getLogger(__name__)

CHOICES = ("native", "plugin", "auto")
ALIGNMENT = 256
"""Of working memory, in bytes (`IExecutionContext.set_device_memory`)."""


@dataclass(frozen=True)
class Options:
    """The config's options, as numbers. workspace: most scratch memory that one layer may take, in MiB.

    attention, norm: "native", "plugin", "auto", or "", which is auto wherever plugins are possible.
    """

    refit: bool = False
    stripped: bool = False
    optimization_level: int | None = None
    workspace: int | None = None
    attention: str = ""
    norm: str = ""

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> Options:
        """Raises EngineError for a name or a value that is not one of these."""
        expected = {"attention": "native, plugin or auto", "norm": "native, plugin or auto", "refit": "true or false",
                    "stripped": "true or false", "optimization_level": "0 to 5", "workspace": "MiB, at least 1"}
        values: dict[str, Any] = {}
        for name, value in options.items():
            if name not in expected:
                raise EngineError(f"tensorrt: got option {name!r}, expected one of {', '.join(expected)}")
            text = str(value).lower()
            if name in KINDS:
                values[name] = text if text in CHOICES else None
            elif name in ("refit", "stripped"):
                values[name] = {"true": True, "false": False}.get(text)
            elif text.isdecimal() and (int(text) <= 5 if name == "optimization_level" else int(text) >= 1):
                values[name] = int(text)
            if values.get(name) is None:
                raise EngineError(f"option {name}: got {value!r}, expected {expected[name]}")
        return cls(**values)

    @property
    def flags(self) -> tuple[str, ...]:
        """Names of TensorRT's BuilderFlags."""
        flags = ("REFIT",) if self.refit else ("REFIT_IDENTICAL",) if self.stripped else ()
        return (*flags, "STRIP_PLAN") if self.stripped else flags


@dataclass(frozen=True)
class Flavour(Backend):
    """One of the two as a backend; see `engines.backend.Backend`."""

    name: str
    rtx: bool
    pip: str
    on_gpu: ClassVar[bool] = True  # type: ignore[misc]

    def vendor(self) -> Any:
        """The vendor's package. Raises EngineError with the pip line where it is missing."""
        with importing(self.name, self.pip):
            if self.rtx:
                import tensorrt_rtx_bindings as trt
            else:
                import tensorrt as trt
        if not hasattr(trt, "Builder"):  # tensorrt-stubs alone makes `import tensorrt` an empty package
            raise EngineError(f"backend {self.name}: got type stubs only, expected the package; run: {self.pip}")
        return trt

    def plugins(self) -> Any:
        """The vendor's module for plugins written in Python. Raises EngineError where there is none."""
        try:
            import tensorrt.plugin
        except ModuleNotFoundError as e:
            raise EngineError(f"backend {self.name}: got no plugins in Python ({e}), expected those of TensorRT 10.13 "
                              "or later; pass --attention native --norm native") from e
        return tensorrt.plugin

    def available(self) -> str | None:
        """None where engines can be built here, else what to do."""
        try:
            self.vendor()
        except EngineError as e:
            return str(e)
        if not self.rtx and not gpus():
            return (f"backend {self.name}: got no NVIDIA GPU, expected the one that will run the engines; "
                    "build there, or use tensorrt-rtx for an RTX GPU")
        return None

    def devices(self) -> list[str]:
        return [*(f"cuda:{number}" for number in range(len(gpus()))), *(self._architectures() if self.rtx else ())]

    def dtypes(self) -> tuple[str, ...]:
        """Precisions that a graph may have, the one to prefer first."""
        return ("fp16", "bf16", "fp32")

    def versions(self, config: EngineConfig | None = None) -> dict[str, str]:
        """What a cached engine depends on beside files and config. Raises EngineError for a device it cannot be for."""
        found = {self.name: self.vendor().__version__}
        if config is None:
            return found
        arch, number = self._target(config)
        here = {} if self.rtx or number is None else dataclasses.asdict(gpus()[number])
        own = {"kernels": _kernels()} if set(self._kernels_asked(config).values()) != {"native"} else {}
        return {**found, "arch": arch, **here, **own}

    def runnable(self, config: EngineConfig) -> str | None:
        """None where a GPU of this machine can run the engine, else why not."""
        arch, number = self._target(config)
        return None if number is not None else (
            f"got {', '.join(g.arch for g in gpus()) or 'no NVIDIA GPU'} here, expected {arch}; "
            "on a machine that has one, run: python -m engines verify BUNDLE")

    def reads_onnx(self, config: EngineConfig) -> bool:
        """A stripped plan's weights are in the ONNX file."""
        return Options.read(config.options).stripped

    def build(self, target: Target, directory: Path) -> None:
        """Write the plan and what its builder said. Raises EngineError for what TensorRT refuses."""
        options = Options.read(target.config.options)
        arch, number = self._target(target.config)
        if target.config.dtype != target.component.dtype:
            raise EngineError(f"{self.name}: got dtype {target.config.dtype}, expected {target.component.dtype}, that of the graph; "
                              f"pass --dtype {target.component.dtype}, or export the checkpoint with --dtype {target.config.dtype}")
        if not self.rtx and number is None:
            raise EngineError(f"{self.name} builds where the engine runs: {self.runnable(target.config)}")
        shapes = [{spec.name: tuple(int(d) for d in spec.shape) for spec in specs.values()}
                  for specs in (target.inputs, target.outputs)]
        cache = "" if self.rtx or number is None else str(self._cache("timing", gpus()[number]))
        asked = self._kernels_asked(target.config)
        build(Request(self.name, str(target.onnx), shapes[0], shapes[1], str(directory), arch, number,
                      target.config.dtype != "fp32", options.flags, options.optimization_level, options.workspace, cache,
                      tolerance=2 * TOLERANCE[target.config.dtype]),
              {kind: wanted for kind, wanted in asked.items() if target.component.sites.get(KINDS[kind])})

    def details(self, directory: Path) -> dict[str, Any]:
        """What the build wrote down about the engine in `directory`; a key is missing where it was not to be had.

        library: name → version. arch, flags: what it was built for and with. kernels: kind of site → {asked, used}.
        timings: [{plugins, seconds, rounds}] of the builds that were compared. failed: build with plugins → why it is
        not used. sites: kind → {plugin, native}, how many nodes are which. layers, attentions: of the network.
        engine_layers: [{name, kind, kernel, milliseconds}] of the plan, measured on the GPU that built it. memory:
        bytes by what for, as the builder said. device_memory_bytes: working memory of a run. refittable: weights that
        can change. plan_bytes, build_seconds, build_peak_bytes, warnings. Raises EngineError for a damaged file.
        """
        file = directory / ABOUT
        try:
            about = json.loads(file.read_text(encoding="utf8"))
            if not isinstance(about, dict):
                raise ValueError(f"got {type(about).__name__}, expected an object")
            return about
        except (OSError, ValueError) as e:
            raise EngineError(f"{file} cannot be read ({e}); build the engine again: python -m engines build BUNDLE "
                              f"--backend {self.name} --rebuild") from e

    def refits(self, config: EngineConfig) -> bool:
        """Whether weights of the engine can change, so that a build has to show that they do."""
        return Options.read(config.options).refit

    def load(self, target: Target, directory: Path) -> TensorRtEngine:
        """Open the plan on its GPU. Raises EngineError where there is none, or TensorRT refuses the plan."""
        number = self._target(target.config)[1]
        if number is None:
            raise EngineError(f"{directory.name} does not run on this machine: {self.runnable(target.config)}")
        key = json.dumps([target.component.files, target.config.to_json()], sort_keys=True)
        compiled = self._cache(hashlib.sha256(key.encode()).hexdigest()[:12], gpus()[number]) if self.rtx else None
        return TensorRtEngine(self.vendor(), target, directory, number, compiled)

    def _kernels_asked(self, config: EngineConfig) -> dict[str, str]:
        """Kind of site → native, plugin or auto. Raises EngineError for a plugin where there can be none."""
        options = Options.read(config.options)
        asked = {kind: getattr(options, kind) for kind in KINDS}
        reason = ("TensorRT-RTX has no plugins in Python; use --backend tensorrt" if self.rtx else
                  "a stripped plan reads its weights from the ONNX file, which has no plugin nodes; pass "
                  "--option stripped=false" if options.stripped else None)
        for kind, wanted in asked.items():
            if reason and wanted not in ("", "native"):
                raise EngineError(f"option {kind}: got {wanted!r}, expected native: {reason}")
        return {kind: "native" if reason else wanted or "auto" for kind, wanted in asked.items()}

    def _target(self, config: EngineConfig) -> tuple[str, int | None]:
        """(architecture, number of the GPU of this machine that has it) for a config's device."""
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
        names = self.vendor().ComputeCapability.__members__
        return sorted((n.replace("SM", "sm_") for n in names if re.fullmatch(r"SM\d+", n)), key=lambda n: int(n[3:]))

    def _cache(self, what: str, gpu: Gpu) -> Path:
        """A file of this user's for one GPU, driver and library."""
        words = "-".join((gpu.name, gpu.arch, hashlib.sha256(gpu.driver.encode()).hexdigest()[:8], what))
        return user_cache() / f"{self.name}-{self.vendor().__version__}" / re.sub(r"[^\w.-]+", "_", words)


RTX = Flavour("tensorrt-rtx", True, "pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings")
ENTERPRISE = Flavour("tensorrt", False, "pip install tensorrt-cu13")


class TensorRtEngine(Engine):
    """A plan opened on GPU number `gpu`; see `engines.backend.Engine`.

    A run needs `workspace_bytes` of working memory, which may be shared with engines that do not run meanwhile: hand it
    over with `use_workspace`. Otherwise `bind` allocates it. `enqueue` only launches, so that it can be captured.
    """

    def __init__(self, trt: Any, target: Target, directory: Path, gpu: int,
                 compiled: Path | None) -> None:
        self.inputs: Mapping[str, TensorSpec] = target.inputs
        self.outputs: Mapping[str, TensorSpec] = target.outputs
        self.gpu = self._gpu = gpu
        self._trt, self._onnx, self._log = trt, target.onnx, logger(trt)
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
        self.workspace_bytes: int = self._engine.device_memory_size_v2
        self._workspace: Any = None
        self.refittable: list[str] = []
        if engine.refittable:
            self.refittable = trt.Refitter(engine, self._log).get_all_weights()
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
            self.use_workspace(Memory(self._gpu, self.workspace_bytes))
        specs = {**self.inputs, **self.outputs}
        check_names(buffers, specs)
        for name, spec in specs.items():
            if not self._context.set_tensor_address(name, device_address(spec, buffers[name])):
                raise EngineError(f"bind {name}: {self._log.why()}")
        self._buffers = dict(buffers)  # keeps the memory alive while its address is bound

    def enqueue(self, stream: Any = None) -> None:
        if not self._buffers:
            raise EngineError("enqueue: no buffers are bound; call bind first")
        if not self._context.execute_async_v3(0 if stream is None else int(getattr(stream, "handle", stream))):
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
        """An execution context without memory. TensorRT-RTX compiles kernels, which the file saves the next process."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context: rt.IExecutionContext | None
        if compiled is None:
            context = self._engine.create_execution_context(strategy)
        else:
            settings: Any = self._engine.create_runtime_config()  # the stubs' has no cache: TensorRT-RTX alone does
            settings.set_execution_context_allocation_strategy(strategy)
            cache = settings.create_runtime_cache()
            if compiled.is_file() and not cache.deserialize(compiled.read_bytes()):
                log.info("%s is of another driver or version; kernels are compiled again", compiled)
            settings.set_runtime_cache(cache)
            context = self._engine.create_execution_context(settings)
            weakref.finalize(self, lambda: write_whole(compiled, cache.serialize()))
        if context is None:
            raise EngineError(f"no execution context: {self._log.why()}")
        return context


def _kernels() -> str:
    """Hash of what our kernels are compiled from, and of the compiler's version."""
    here = Path(kernels.__file__).parent
    names = ["aot/compiler.py", "aot/specialise.py", "aot/variant.py", "triton/attention.py", "triton/group_norm.py",
             "triton/group_norm_kernels.py"]
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return hashlib.sha256(json.dumps([triton, hash_files(here, names)], sort_keys=True).encode()).hexdigest()[:12]
