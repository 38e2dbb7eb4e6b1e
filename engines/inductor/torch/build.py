"""Building a package: rewrite the graph, survey its sites, choose their kernels, trace it, compile what was traced."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.utils import fresh_cache
from torch.utils.cpp_extension import CUDA_HOME

from engines.backend import Target
from engines.check.tolerance import TOLERANCE
from engines.inductor import device, passes
from engines.inductor.options import Options
from engines.inductor.record import CONSTANTS, PACKAGE, Record
from engines.inductor.torch.choice import choose
from engines.inductor.torch.module import OnnxModule, survey
from engines.inductor.torch.parameters import large_linears
from engines.inductor.torch.run import Settings
from engines.inductor.torch.weights import DTYPES, Names
from engines.machine.vendor import errors
from engines.spec import EngineError

logger = logging.getLogger(__name__)


def build(target: Target, directory: Path, options: Options, number: int | None) -> None:
    """Write the package, its record and its constants, for GPU `number` or, for None, the CPU.

    Raises EngineError where the compiler is missing, or for what PyTorch cannot trace or compile.
    """
    _check_tools(number)
    start = time.perf_counter()
    with (errors(f"inductor could not compile {target.onnx}"), torch.no_grad(), device.flags(target.config),
          warnings.catch_warnings()):
        warnings.simplefilter("ignore")  # PyTorch warns of its own parts
        module, timed = _module(target, options, device.name(number))
        inputs, where = target.inputs, device.name(number)
        program = torch.export.export(module, tuple(
            torch.zeros(tuple(map(int, spec.shape)), dtype=getattr(torch, spec.dtype), device=where)
            for spec in (inputs[str(value.name)] for value in module.graph.inputs)), strict=False)
        logger.info("%s: traced in %.1f s, compiling: %s", target.onnx.name, time.perf_counter() - start, ", ".join(
            f"{count} {site} {whose}" for (site, whose), count in sorted(module.learned.used.items())))
        _compile(program, directory, {"max_autotune": options.max_autotune})
    arrays: Mapping[str, Any] = module.learned.constants
    np.savez(directory / CONSTANTS, **arrays)
    _record(module, options, timed).write(directory)
    if number is not None:
        torch.cuda.empty_cache()  # what the weights took


def _module(target: Target, options: Options, where: str) -> tuple[OnnxModule, dict[str, Any]]:
    """Return the module to trace, whose weights are memory that nobody has written, and what was timed for it."""
    config, inputs = target.config, target.inputs
    model = passes.read(target.onnx)
    passes.rewrite(model, options.fuse)
    graph = model.graph
    if (names := {str(value.name) for value in graph.inputs}) != set(inputs):
        raise EngineError(f"graph inputs: got {sorted(names)}, expected {sorted(inputs)} as the manifest says; "
                          "export the bundle again")
    settings = Settings(config.dtype, options.ours, cpp=where == "cpu" and bool(options.ours))
    shapes = {name: (tuple(map(int, spec.shape)), spec.dtype) for name, spec in inputs.items()}
    learned = survey(graph, shapes, settings)
    if config.threads and where == "cpu":
        torch.set_num_threads(config.threads)
    chosen, timed = choose(learned.both, options.kernels, DTYPES[config.dtype], where, 2 * TOLERANCE[config.dtype])
    in_fp8: frozenset[Names] = frozenset()
    if options.fp8_least is not None:
        in_fp8 = large_linears(graph, learned.rows, options.fp8_least)
    settings = dataclasses.replace(settings, chosen=chosen, fp8=in_fp8)
    return OnnxModule(graph, settings, where, learned.constants), timed


def _record(module: OnnxModule, options: Options, timed: Mapping[str, Any]) -> Record:
    sites: dict[str, dict[str, int]] = {}
    for (kind, whose), count in sorted(module.learned.used.items()):
        sites.setdefault(kind, {})[whose] = count
    kernels = {kind: {"asked": asked, "used": " and ".join(sites[kind])}
               for kind, asked in options.kernels.items() if kind in sites}
    return Record([str(value.name) for value in module.graph.inputs],
                  [str(value.name) for value in module.graph.outputs],
                  {name: dataclasses.asdict(weight) for name, weight in module.weights.items()},
                  module.settings.cpp, kernels, sites, **timed)


def _compile(program: Any, directory: Path, settings: Mapping[str, Any]) -> None:
    """Compile an exported program to `directory`/PACKAGE, in an Inductor cache of its own that is removed."""
    configs = {**settings, "always_keep_tensor_constants": True,  # small weights are not literals: they can be refitted
               "aot_inductor.package_constants_in_so": False,
               "aot_inductor.precompile_headers": False,  # each would be used once
               "cpp.dynamic_threads": True}
    with tempfile.TemporaryDirectory(dir=directory) as cache, fresh_cache(dir=cache):
        torch._inductor.aoti_compile_and_package(program, package_path=str(directory / PACKAGE),
                                                 inductor_configs=configs)


def _check_tools(number: int | None) -> None:
    """Raises EngineError where the C++ compiler, or for a GPU CUDA's headers, are missing."""
    try:
        get_cpp_compiler()
    except RuntimeError as e:
        raise EngineError("inductor: got no C++ compiler, expected g++ or clang++ to build engines (not to run them); "
                          "install one (Debian and Ubuntu: apt install g++), or set CXX") from e
    if number is not None and CUDA_HOME is None:
        raise EngineError("inductor: got no CUDA toolkit, expected its headers and libraries to build engines (not to "
                          "run); install it, or set CUDA_HOME")
