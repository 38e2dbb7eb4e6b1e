"""Any PyTorch module as a component that engines open: networks that are no part of a Stable Diffusion checkpoint."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from engines.backend import Target
from engines.bundle import Check, Component, hash_files
from engines.check import compare
from engines.spec import EngineConfig, EngineError, TensorSpec
from export.errors import ExportError
from export.trace.component import REFERENCE
from export.trace.sites import count_sites
from export.trace.trace import trace
from export.trace.traced_module import TracedModule


class _Module(TracedModule):
    """`model` itself, called with its inputs in order."""

    role = "module"
    rows = "image"

    def __init__(self, model: nn.Module, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        super().__init__(model)
        self.source = type(model).__name__
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)

    def call(self, inputs: Sequence[torch.Tensor], shapes: Sequence[Mapping[int, str]]) -> dict[str, Any]:
        return {"args": tuple(inputs), "dynamic_shapes": (tuple(shapes),)}

    def run(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            outputs = self(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return self.model(*inputs)


def trace_module(module: nn.Module, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec],
                 example: Sequence[torch.Tensor], file: Path) -> Component:
    """Trace a module in float32 as `export.trace.trace` traces those of a checkpoint, and compare the graph with it.

    module: is put into eval mode. inputs, outputs: of its `forward`, in order; a dimension that has a name, one of
    `EngineConfig.dims`, is any size, which an engine then fixes. example: inputs to trace and to compare with, of at
    least 2 in every named dimension. file: where the .onnx file goes, with its weights beside it (.onnx.data).

    What comes back is for `build` and `load` of a backend (`engines.backend`), beside `file` and a config; it is in no
    bundle. Raises ExportError where the module cannot be traced, or the graph is further from it than
    `engines.check.tolerance.TOLERANCE`; what was at `file` is then still there.
    """
    graph = _Module(module, inputs, outputs).eval()
    expected = {spec.name: value.numpy() for spec, value in zip(graph.outputs, graph.run(example), strict=True)}
    model = trace(graph, example)
    feed = {spec.name: value.numpy() for spec, value in zip(graph.inputs, example, strict=True)}
    dims = {d: n for spec, value in zip(graph.inputs, example, strict=True)
            for d, n in zip(spec.shape, value.shape, strict=True) if isinstance(d, str)}
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as temporary:
        new = Path(temporary) / file.name
        ir.save(model, new, external_data=f"{file.name}.data")
        written = sorted((path.name for path in new.parent.iterdir()), reverse=True)  # the weights first
        component = Component(
            file=file.name, files=hash_files(new.parent, written), dtype="fp32", role="module", network=file.stem,
            rows="image", inputs=graph.inputs, outputs=graph.outputs, sites=count_sites(model.graph),
            check=Check("not checked", 0, 0.0, 0.0))
        try:
            got = compare.run_reference(
                Target(new.parent, file.name, component, EngineConfig("onnxruntime", dims)), feed)
            check = compare.arrays(got, expected, "fp32", file.name, 0, REFERENCE)
        except EngineError as e:
            raise ExportError(str(e)) from e
        for name in written:
            os.replace(new.parent / name, file.parent / name)
    return dataclasses.replace(component, check=check)
