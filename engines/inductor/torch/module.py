"""An ONNX graph as a torch module of static shapes, for torch.export to trace.

The module interprets the nodes; tracing leaves only the tensor operators of `engines/inductor/torch/ops.py`. What
depends on shapes and constants alone is computed in numpy meanwhile, so that no shape arithmetic is left.
Floating-point values are of one dtype, but for the angles of `engines.inductor.passes`, whatever casts the graph has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from engines.inductor.passes import angles
from engines.inductor.torch import sites
from engines.inductor.torch.ops import step
from engines.inductor.torch.parameters import weights_of
from engines.inductor.torch.run import Run, Settings, Survey
from engines.inductor.torch.weights import Weight, scales_name


class OnnxModule(torch.nn.Module):
    """forward(inputs in the graph's order) → outputs: float32 (or integers) at both ends, one dtype inside.

    weights: name of a buffer → what it holds; `scales_name` is where its scales are in fp8; their memory is left as it
    comes. constants: name of a buffer → values, as a `survey` found them; None where this is one. learned: what the
    last runs have found; `used` of it is of the last alone.
    """

    def __init__(self, graph: ir.Graph, settings: Settings, device: Any,
                 constants: Mapping[str, np.ndarray] | None = None) -> None:
        super().__init__()
        self.graph, self.settings = graph, settings
        self.learned = Survey(dict(constants or {}), complete=constants is not None)
        self.angles = angles(graph)
        self.weights: dict[str, Weight] = weights_of(graph, settings.dtype, self.angles, settings.fp8)
        self.parameters_of = {weight.names: name for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            self.register_buffer(name, weight.empty(device))
            if weight.dtype == "fp8":
                self.register_buffer(scales_name(name), weight.scales(device))
        for name, values in self.learned.constants.items():
            self.register_buffer(name, torch.from_numpy(values).to(device))
        if settings.kernels:
            sites.register(settings.cpp)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        run = Run(self.settings, self.learned, dict(self.named_buffers()), self.parameters_of, self.angles,
                  dict(zip(self.graph.inputs, inputs, strict=True)))
        self.learned.used.clear()
        for node in self.graph:
            step(run, node)
        outputs = [run.values[value] for value in self.graph.outputs]
        return tuple(x.to(torch.float32 if x.is_floating_point() else x.dtype).contiguous() for x in outputs)


def survey(graph: ir.Graph, shapes: Mapping[str, tuple[tuple[int, ...], str]], settings: Settings) -> Survey:
    """Return what a run on the meta device learns at these static shapes (input → shape, numpy dtype).

    Raises EngineError for an operator that there is no way to compute.
    """
    module = OnnxModule(graph, settings, "meta")
    with torch.no_grad():
        module(*(torch.empty(shape, dtype=getattr(torch, kind), device="meta") for shape, kind in
                 (shapes[str(value.name)] for value in graph.inputs)))
    return module.learned
