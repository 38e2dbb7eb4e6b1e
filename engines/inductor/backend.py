"""PyTorch's own compiler, ahead of time: the graph as a torch module, torch.export, an AOTInductor package.

A package holds code for one processor or GPU architecture and no weights: those are read from the bundle's ONNX file
when it is opened, into memory that the package is told of, and a refit writes them there in place. Nothing is compiled
when it is opened; building needs a C++ compiler.

On a GPU attention, group norm with SiLU, layer norm and GEGLU can be our Triton kernels, compiled into the package; on
a CPU the first two can be our C++ kernels, which the package calls through Python. Projections that read the same value
are one product, convolutions have their channels last.
Options: attention, group_norm, layer_norm, geglu = latentrt, torch, or auto, which times both at every site; fp8 =
linear, for linear layers in float8 (`engines/inductor/fp8.py`), and fp8_least, how large they are at least; fuse =
false keeps projections apart; max_autotune = false, on a GPU, does not time Triton's convolutions and products against
cuDNN's and cuBLAS's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engines.backend import Backend, Engine, Target
from engines.check.tolerance import TOLERANCE
from engines.inductor import nodes as onnx_nodes
from engines.inductor.options import Options, check_fp8
from engines.machine.buffers import check_array, check_names, device_address
from engines.machine.cpu import describe
from engines.machine.gpu import gpus
from engines.machine.vendor import errors, importing
from engines.onnx.initializers import convert, values
from engines.onnx.low_rank import Weight
from engines.spec import EngineConfig, EngineError, TensorSpec
from kernels.cpu import library

PIP = "pip install torch onnx-ir"
PACKAGE, RECORD, CONSTANTS = "package.pt2", "inductor.json", "constants.npz"

log = logging.getLogger(__name__)


class Inductor(Backend):
    """AOTInductor as a backend."""

    name = "inductor"

    def available(self) -> str | None:
        """None where it can be used, else what to do."""
        if importlib.util.find_spec("torch") is None:
            return f"backend inductor: the package is missing; run: {PIP}"
        return None

    def devices(self) -> list[str]:
        torch = _vendor()
        return ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count() if torch.version.cuda else 0))]

    def dtypes(self) -> tuple[str, ...]:
        """Precisions this machine computes in, the one to prefer first."""
        return ("fp16", "fp32", "bf16") if len(self.devices()) > 1 else _cpu_dtypes()

    def versions(self, config: EngineConfig | None = None) -> dict[str, str]:
        """What a cached engine depends on beside files and config. Raises EngineError for a device that is not here."""
        if reason := self.available():
            raise EngineError(reason)
        found = {"inductor": importlib.metadata.version("torch")}
        if config is None:
            return found
        if (number := _gpu(config)) is None:
            own = set(Options.read(config).kernels.values()) - {"torch"}
            return {**found, **describe(), **({"kernels": library.fingerprint()} if own else {})}
        return {**found, **dataclasses.asdict(gpus()[number])}  # a version of PyTorch has one of Triton

    def build(self, target: Target, directory: Path) -> None:
        """Write the package, what its weights are, and its constants. Raises EngineError where that cannot be done."""
        options, number = Options.read(target.config), _gpu(target.config)
        if options.fp8_least is not None and number is not None:
            check_fp8(gpus()[number].arch)
        here = _cpu_dtypes() if number is None else ("fp16", "bf16", "fp32")
        if target.config.dtype not in here:
            raise EngineError(f"inductor: got dtype {target.config.dtype}, but {describe()['cpu']} computes in {', '.join(here)}; "
                              "pass --dtype fp32")
        _check_tools(number)
        _build(target, directory, options, "cpu" if number is None else f"cuda:{number}")
        if number is not None:
            _vendor().cuda.empty_cache()  # what the weights took

    def load(self, target: Target, directory: Path) -> InductorEngine:
        """Open the package and give it its weights. Raises EngineError where PyTorch cannot."""
        with errors(f"inductor could not open {directory}"):
            return InductorEngine(target, directory)

    def details(self, directory: Path) -> dict[str, Any]:
        """What the build wrote down about the engine in `directory`.

        kernels: kind of site → {asked, used}. timings: [{kind, shapes, arguments, sites, used, seconds, rounds}] of the
        kinds of sites where both kernels were timed, seconds and rounds by whose. failed: site → why ours is not used.
        sites: kind → {latentrt, torch or fp8}, how many. Raises EngineError for a damaged file.
        """
        record = _record(directory)
        return {name: record[name] for name in ("kernels", "timings", "failed", "sites")}


INDUCTOR = Inductor()


def _build(target: Target, directory: Path, options: Options,
           device: str) -> None:
    torch = _vendor()
    from engines.inductor import choice as inductor_choice
    from engines.inductor import module as onnx_torch

    inputs = target.inputs
    shapes = {name: (tuple(int(d) for d in spec.shape), spec.dtype) for name, spec in inputs.items()}
    start = time.perf_counter()
    with (errors(f"inductor could not compile {target.onnx}"), torch.no_grad(), _flags(torch, target.config),
          warnings.catch_warnings()):
        warnings.simplefilter("ignore")  # PyTorch warns of its own parts
        graph = onnx_torch.rewrite(onnx_nodes.read(target.onnx), options.fuse)
        if set(graph.inputs) != set(shapes):
            raise EngineError(f"graph inputs: got {sorted(graph.inputs)}, expected {sorted(shapes)} as the manifest "
                              "says; export the bundle again")
        ours = frozenset(kind for kind, whose in options.kernels.items() if whose != "torch")
        found = onnx_torch.survey(graph, shapes, target.config.dtype, ours, native=device == "cpu" and bool(ours))
        if target.config.threads and device == "cpu":
            torch.set_num_threads(target.config.threads)
        chosen, measured = inductor_choice.choose(found.both, options.kernels, found.dtype, device,
                                                  2 * TOLERANCE[target.config.dtype])
        module = onnx_torch.build(found, target.config.dtype, device, chosen, options.fp8_least)
        program = torch.export.export(module, tuple(
            torch.zeros(shape, dtype=getattr(torch, kind), device=device)
            for shape, kind in (shapes[name] for name in graph.inputs)), strict=False)
        log.info("%s: traced in %.1f s, compiling: %s", target.onnx.name, time.perf_counter() - start, ", ".join(
            f"{count} {site} {whose}" for (site, whose), count in sorted(module.used.items())))
        _compile(program, directory, {"max_autotune": options.max_autotune})
    arrays: Mapping[str, Any] = module.constants
    np.savez(directory / CONSTANTS, **arrays)
    sites: dict[str, dict[str, int]] = {}
    for (site, whose), count in sorted(module.used.items()):
        sites.setdefault(site, {})[whose] = count
    record = {"inputs": graph.inputs, "outputs": graph.outputs, "sites": sites,
              "kernels": {kind: {"asked": asked, "used": " and ".join(sites[kind])}
                          for kind, asked in options.kernels.items() if kind in sites},
              **measured, "native": found.native,
              "weights": {name: dataclasses.asdict(weight) for name, weight in module.weights.items()}}
    (directory / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf8")


class InductorEngine(Engine):
    """A package opened on the CPU, or on the GPU of number `gpu`; see `engines.backend.Engine`.

    On a GPU it runs once when it is opened, so that its kernels are loaded, and the memory that it computes in belongs
    to it alone: a captured `enqueue` stays valid whatever else PyTorch allocates, and after a refit. precision: "fp8"
    with linear layers in that, else the config's.
    """

    def __init__(self, target: Target, directory: Path) -> None:
        torch = _vendor()
        from engines.inductor.module import Weight, scales_name

        self.inputs: Mapping[str, TensorSpec] = target.inputs
        self.outputs: Mapping[str, TensorSpec] = target.outputs
        self.gpu = _gpu(target.config)
        self._torch, self._onnx, self._config = torch, target.onnx, target.config
        self._device = "cpu" if self.gpu is None else f"cuda:{self.gpu}"
        self._buffers: dict[str, Any] = {}
        record = _record(directory)
        if record["native"]:
            importlib.import_module("kernels.cpu.torch_ops")  # registers what the package calls
        self._order: tuple[list[str], list[str]] = (record["inputs"], record["outputs"])
        self._package = torch._inductor.aoti_load_package(
            str(directory / PACKAGE), run_single_threaded=True, device_index=-1 if self.gpu is None else self.gpu)
        needed = self._package.get_constant_fqns()
        self._weights = {name: Weight(tuple(w["names"]), tuple(map(tuple, w["shapes"])), w["dtype"], w["channels_last"])
                         for name, w in record["weights"].items() if name in needed}
        self.precision = "fp8" if any(w.dtype == "fp8" for w in self._weights.values()) else target.config.dtype
        stored = values(target.onnx)
        self._memory = {name: weight.empty(self._device) for name, weight in self._weights.items()}
        self._scales = {name: weight.scales(self._device) for name, weight in self._weights.items()
                        if weight.dtype == "fp8"}
        self._memory |= {scales_name(name): scales for name, scales in self._scales.items()}
        for name in self._weights:
            self._write(name, {part: stored[part] for part in self._weights[name].names})
        with np.load(directory / CONSTANTS) as constants:
            self._memory |= {name: torch.from_numpy(constants[name]).to(self._device) for name in constants}
        if unknown := sorted(set(needed) - set(self._memory)):
            raise EngineError(f"{directory / PACKAGE}: got constants {unknown[:3]}, expected those of {RECORD}; this "
                              "version of PyTorch added some; build it again with the one before")
        self._package.load_constants({name: self._memory[name] for name in needed}, check_full_update=False,
                                     user_managed=True)  # it reads them where they are
        if self.gpu is not None:
            self._pool = torch.cuda.MemPool()
            self._run([torch.zeros(tuple(map(int, self.inputs[name].shape)), device=self._device,
                                   dtype=getattr(torch, self.inputs[name].dtype)) for name in self._order[0]], None, [])
            torch.cuda.synchronize(self.gpu)

    def bind(self, buffers: Mapping[str, Any]) -> None:
        specs = {**self.inputs, **self.outputs}
        check_names(buffers, specs)
        found = {name: self._tensor(spec, buffers[name]) for name, spec in specs.items()}
        self._buffers = dict(buffers)  # keeps the memory alive while its address is bound
        self._bound = [[found[name] for name in names] for names in self._order]

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
        """Where the package runs: `stream` of its GPU (the default one for None), or as many threads as asked for."""
        torch = self._torch
        if self.gpu is None:
            if self._config.threads and torch.get_num_threads() != self._config.threads:
                torch.set_num_threads(self._config.threads)
            yield
            return
        handle = 0 if stream is None else int(getattr(stream, "handle", stream))
        own = torch.cuda.ExternalStream(handle, self.gpu) if handle else torch.cuda.default_stream(self.gpu)
        with (torch.cuda.device(self.gpu), torch.cuda.stream(own), torch.cuda.use_mem_pool(self._pool, self.gpu),
              _flags(torch, self._config)):
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


def _compile(program: Any, directory: Path, settings: Mapping[str, Any]) -> None:
    """Compile an exported program to `directory`/PACKAGE, in an Inductor cache of its own that is removed."""
    import torch
    from torch._inductor.utils import fresh_cache

    configs = {**settings, "always_keep_tensor_constants": True,  # small weights are not literals: they can be refitted
               "aot_inductor.package_constants_in_so": False,
               "aot_inductor.precompile_headers": False,  # each would be used once
               "cpp.dynamic_threads": True}
    with tempfile.TemporaryDirectory(dir=directory) as cache, fresh_cache(dir=cache):
        torch._inductor.aoti_compile_and_package(program, package_path=str(directory / PACKAGE),
                                                 inductor_configs=configs)


def _record(directory: Path) -> dict[str, Any]:
    file = directory / RECORD
    try:
        return dict(json.loads(file.read_text(encoding="utf8")))
    except (OSError, ValueError) as e:
        raise EngineError(f"{file} cannot be read ({e}); build the engine again: python -m engines build BUNDLE "
                          "--backend inductor --rebuild") from e


def _check_tools(number: int | None) -> None:
    """Raises EngineError where the C++ compiler, or for a GPU CUDA's headers, are missing."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch.utils.cpp_extension import CUDA_HOME

    try:
        get_cpp_compiler()
    except RuntimeError as e:
        raise EngineError("inductor: got no C++ compiler, expected g++ or clang++ to build engines (not to run them); "
                          "install one (Debian and Ubuntu: apt install g++), or set CXX") from e
    if number is not None and CUDA_HOME is None:
        raise EngineError("inductor: got no CUDA toolkit, expected its headers and libraries to build engines (not to "
                          "run); install it, or set CUDA_HOME")


def _cpu_dtypes() -> tuple[str, ...]:
    has = describe()["isa"].split()
    return ("bf16", "fp32") if {"avx512_bf16", "amx_bf16", "bf16"} & set(has) else ("fp32",)


def _gpu(config: EngineConfig) -> int | None:
    """Number of the config's GPU, None for the CPU. Raises EngineError for a device that is not here."""
    if config.device == "cpu":
        return None
    found = re.fullmatch(r"cuda(?::(\d+))?", config.device)
    if not found:
        raise EngineError(f"inductor: got device {config.device!r}, expected cpu or cuda:N")
    number, here = int(found[1] or 0), gpus()
    if number >= len(here):
        raise EngineError(f"inductor: got device {config.device} on a machine of {len(here)} NVIDIA GPUs, expected one "
                          "of its own; packages are built where they run")
    if _vendor().version.cuda is None:
        raise EngineError(f"inductor: got device {config.device} and PyTorch without CUDA, expected one with it; "
                          "see https://pytorch.org/get-started/locally")
    return number


@contextlib.contextmanager
def _flags(torch: Any, config: EngineConfig) -> Iterator[None]:
    """cuDNN as engines use it: convolutions timed once a shape, and TF32 never where float32 was asked for."""
    if config.device == "cpu":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False,
                                    allow_tf32=config.dtype != "fp32"):
        yield


def _vendor() -> Any:
    with importing("inductor", PIP):
        import torch
    return torch
