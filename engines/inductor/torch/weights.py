"""A weight tells which initializers a parameter holds, in which dtype and order, and how values get there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from engines.inductor.torch import fp8

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}

Names = tuple[str, ...]
"""Initializers that are one parameter, in their order."""


@dataclass(frozen=True)
class Weight:
    """A weight is initializers one after the other along the first axis; channels_last: that memory order.

    dtype: a name of DTYPES; one in fp8 has scales beside it, float32 [1, rows], as `fp8.linear` reads them.
    """

    names: Names
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    channels_last: bool

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Return the weight of these fields, which JSON may have held."""
        return cls(tuple(fields["names"]), tuple(map(tuple, fields["shapes"])), fields["dtype"],
                   fields["channels_last"])

    def empty(self, device: Any) -> torch.Tensor:
        """Return memory for it, of strides that depend on nothing but this record."""
        size = (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])
        memory = torch.channels_last if self.channels_last else torch.contiguous_format
        return torch.empty(size, dtype=DTYPES[self.dtype], device=device, memory_format=memory)

    def part(self, parameter: torch.Tensor, name: str) -> torch.Tensor:
        """Return the view of `parameter` that holds one of its initializers."""
        return parameter.narrow(0, *self._rows(name))

    def scales(self, device: Any) -> torch.Tensor:
        """Return memory for the scales of a parameter in fp8."""
        return torch.empty((1, sum(shape[0] for shape in self.shapes)), dtype=torch.float32, device=device)

    def write(self, parameter: torch.Tensor, scales: torch.Tensor | None, name: str, values: torch.Tensor) -> None:
        """Give one of its initializers these values, floating-point of its shape; quantised for a parameter in fp8."""
        if scales is None:
            self.part(parameter, name).copy_(values)
            return
        quantised, scale = fp8.quantise(values.to(parameter.device))
        self.part(parameter, name).copy_(quantised)
        scales.narrow(1, *self._rows(name)).copy_(scale.t())

    def _rows(self, name: str) -> tuple[int, int]:
        """Return where one of its initializers begins along the first axis, and how long it is."""
        at = self.names.index(name)
        return sum(shape[0] for shape in self.shapes[:at]), self.shapes[at][0]


def scales_name(name: str) -> str:
    """Return the name of the buffer that holds the scales of parameter `name`."""
    return f"{name}_scales"
