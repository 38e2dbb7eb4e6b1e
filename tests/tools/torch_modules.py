"""Graphs as the torch modules that inductor compiles, with their weights: tests run them without compiling, eagerly."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engines.backend import Target
from engines.inductor import passes
from engines.inductor.torch.known import numbers
from engines.inductor.torch.module import OnnxModule, survey
from engines.inductor.torch.parameters import large_linears
from engines.inductor.torch.run import Settings
from engines.inductor.torch.weights import scales_name


def shapes_of(target: Target) -> dict[str, tuple[tuple[int, ...], str]]:
    """Input → shape and dtype, as `survey` takes them."""
    return {name: (tuple(map(int, spec.shape)), spec.dtype) for name, spec in target.inputs.items()}


def torch_module(file: Path, shapes: Mapping[str, tuple[tuple[int, ...], str]], settings: Settings | None = None,
                 fuse: bool = True, fp8_least: int | None = None) -> OnnxModule:
    """The module of an ONNX file on the CPU, in float32 where no settings are given, with the weights of the file."""
    settings, model = settings or Settings("fp32"), passes.read(file)
    passes.rewrite(model, fuse)
    found = survey(model.graph, shapes, settings)
    if fp8_least is not None:
        settings = dataclasses.replace(settings, fp8=large_linears(model.graph, found.rows, fp8_least))
    module = OnnxModule(model.graph, settings, "cpu", found.constants)
    for name, weight in module.weights.items():
        scales = getattr(module, scales_name(name), None)
        for part in weight.names:
            values = torch.from_numpy(numbers(model.graph.initializers[part]).copy())
            weight.write(getattr(module, name), scales, part, values)
    return module


def run(module: OnnxModule, feed: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Output → array of a module for arrays by the names of its inputs."""
    with torch.no_grad():
        results = module(*(torch.from_numpy(feed[value.name]) for value in module.graph.inputs))
    return {value.name: result.numpy() for value, result in zip(module.graph.outputs, results, strict=True)}
