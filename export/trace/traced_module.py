"""PyTorch modules as they are traced, and the graphs that are made of one beside the plain one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import onnx_ir as ir
import torch
from torch import nn

from engines.spec import TensorSpec

Arrays = Mapping[str, torch.Tensor]


class Cut(NamedTuple):
    """A part of a graph that is cut out of it, for engines of its own.

    part: its name. reads: the inputs that it may depend on, of which a module may lack some. rows: of its engines, as
    in `engines.bundle.Component`. shape: of what it hands over, where ONNX cannot infer it; None for a
    dimension that it can.
    """

    part: str
    reads: tuple[str, ...]
    rows: int
    shape: tuple[int | str | None, ...] | None = None


@dataclass(frozen=True)
class Extension:
    """A graph that a pass makes of another, with more inputs and outputs, on the same weights: NAME_VARIANT.

    base: the variant that it is made of, "" for the plain graph. inputs, outputs: what it has beside the plain one's.
    rewrite: the pass, which changes a model in place and raises ExportError where it does not find every place. eager:
    lets the PyTorch model be given these inputs wherever it is called in the block, and yields these outputs.
    """

    variant: str
    base: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    rewrite: Callable[[ir.Model], int]
    eager: Callable[[nn.Module, Arrays], AbstractContextManager[Arrays]]


class TracedModule(nn.Module):
    """A module with float32 inputs and outputs, whatever its own dtype, that becomes one ONNX graph.

    model: what it wraps. source: the graph's name, that of the module in a checkpoint. role, rows, label: what
    `engines.bundle.Component` says of it. cuts: the parts that `export.passes.hoist` makes of it beside its body.
    inputs, outputs: their specs. below: input of whole numbers → what they are less than.
    """

    source: str
    role: ClassVar[str]
    rows: ClassVar[int | str]
    label: str = ""
    cuts: tuple[Cut, ...] = ()
    below: Mapping[str, int] = MappingProxyType({})
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def used(self) -> nn.Module:
        """The part of the model that this graph computes."""
        return self.model

    @property
    def extensions(self) -> tuple[Extension, ...]:
        """Graphs that are made of this one, each after its base."""
        return ()

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return next(self.model.parameters()).dtype

    def run(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Compute the outputs for `inputs`, both in the order of the specs."""
        with torch.no_grad():
            outputs = self(**dict(zip([spec.name for spec in self.inputs], inputs, strict=True)))
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def call(self, inputs: Sequence[torch.Tensor], shapes: Sequence[Mapping[int, str]]) -> dict[str, Any]:
        """Return the arguments by which PyTorch's exporter is given inputs and their symbolic dimensions."""
        names = [spec.name for spec in self.inputs]
        return {"kwargs": dict(zip(names, inputs, strict=True)),
                "dynamic_shapes": dict(zip(names, shapes, strict=True))}

    def example(self, dims: Mapping[str, int], seed: int) -> tuple[torch.Tensor, ...]:
        """Draw inputs: standard normal, whole numbers below `below`, or those of a spec's span."""
        generator = torch.Generator().manual_seed(seed)
        values = []
        for spec in self.inputs:
            shape = [d if isinstance(d, int) else dims[d] for d in spec.shape]
            if spec.name in self.below:
                values.append(torch.randint(self.below[spec.name], shape, generator=generator))
            elif spec.span is not None:
                low, high = spec.span
                values.append(torch.rand(shape, generator=generator) * (high - low) + low)
            else:
                values.append(torch.randn(shape, generator=generator))
        return tuple(values)
