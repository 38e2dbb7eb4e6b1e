"""A run of a graph in PyTorch holds the values so far, what is known of them, and which kernel computes a site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from engines.inductor.torch import known
from engines.inductor.torch.weights import DTYPES, Names, scales_name
from engines.spec import EngineError


@dataclass(frozen=True)
class Site:
    """A site is what more than one kernel computes: kind, shapes of its tensors, and its other arguments by name.

    Equal sites of a graph are one.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    arguments: tuple[tuple[str, Any], ...]


@dataclass
class Both:
    """The two ways to compute a site, functions of its tensors and arguments; their strides; how often it is there."""

    ours: Callable[..., torch.Tensor]
    vendor: Callable[..., torch.Tensor]
    strides: tuple[tuple[int, ...], ...]
    count: int = 0


@dataclass(frozen=True)
class Settings:
    """Settings say how a module computes.

    dtype: a name of `weights.DTYPES`, of floating-point values but angles. kernels: kinds of `options.KINDS` that are
    ours where they can be; cpp: those in C++, for CPUs, not in Triton. chosen: site → "ours" or "vendor", where it is
    not as `kernels` says. fp8: the weights of linear layers in float8.
    """

    dtype: str
    kernels: frozenset[str] = frozenset()
    cpp: bool = False
    chosen: Mapping[Site, str] = field(default_factory=dict)
    fp8: frozenset[Names] = frozenset()


@dataclass
class Survey:
    """A survey is what a run learns about a graph at its static shapes.

    constants: name of a buffer → values that are known without any input; complete: no more of them are added. both:
    every site that our kernels could do → its two ways. rows: weights of a linear layer → rows of its input, the
    fewest. used: (kind of site, "ours", "vendor" or "fp8") → how many.
    """

    constants: dict[str, np.ndarray] = field(default_factory=dict)
    complete: bool = False
    both: dict[Site, Both] = field(default_factory=dict)
    rows: dict[Names, int] = field(default_factory=dict)
    used: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass
class Run:
    """Values of one forward: tensors, and numpy arrays where they are known without any input.

    memory: the module's buffers by name. parameters: initializers → the buffer that holds them. angles: values that
    are computed in float32, as the node is whose turn it is where `wide`.
    """

    settings: Settings
    survey: Survey
    memory: Mapping[str, torch.Tensor]
    parameters: Mapping[Names, str]
    angles: Set[ir.Value]
    values: dict[ir.Value, Any]
    wide: bool = False

    def constant(self, value: ir.Value) -> np.ndarray | None:
        """Return what `value` is known to be, else None. Weights are not: they can be given new values."""
        now = self.values.get(value)
        if now is None:
            return known.fixed(value)
        return now if isinstance(now, np.ndarray) else None

    def known(self, value: ir.Value) -> np.ndarray:
        """Return what `value` is, which has to be known: a shape, axes, scales."""
        now = self.constant(value)
        if now is None and value.is_initializer():
            now = known.numbers(value)
        if now is None:
            raise EngineError(f"inductor: got {value.name}, which depends on the inputs, expected it to follow from "
                              "shapes; use another backend")
        return now

    def tensor(self, value: ir.Value) -> Any:
        """Return a tensor of the node's dtype, or a Python number."""
        now = self.constant(value)
        if now is not None:
            if now.size == 1 and now.ndim < 2:
                return now.item()
            return self.buffer(now)
        return self.cast(self.values[value] if value in self.values else self.parameter((str(value.name),)))

    def cast(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` in the node's dtype, where it is floating-point."""
        dtype = torch.float32 if self.wide else DTYPES[self.settings.dtype]
        return x.to(dtype) if x.is_floating_point() and x.dtype != dtype else x

    def parameter(self, names: Names) -> torch.Tensor:
        """Return the parameter that holds these initializers."""
        return self.memory[self.parameters[names]]

    def scales(self, names: Names) -> torch.Tensor:
        """Return the scales of a parameter in float8."""
        return self.memory[scales_name(self.parameters[names])]

    def buffer(self, values: np.ndarray) -> torch.Tensor:
        """Return a known array as a buffer of the module; equal ones are one."""
        values = np.array(values, np.float32 if values.dtype.kind == "f" else None)  # a copy, in order
        constants = self.survey.constants
        name = next((n for n, v in constants.items() if v.dtype == values.dtype and v.shape == values.shape
                     and np.array_equal(v, values)), f"c{len(constants)}")
        if self.survey.complete:
            return self.cast(self.memory[name])
        constants[name] = values
        return self.cast(torch.from_numpy(values).to("meta"))

    def either(self, kind: str, fits: bool, ours: Callable[..., torch.Tensor], vendor: Callable[..., torch.Tensor],
               *tensors: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Return what `ours` or `vendor` makes of the tensors and arguments, and count the site. fits: ours can."""
        site = Site(kind, tuple(tuple(x.shape) for x in tensors), tuple(arguments.items()))
        fits = fits and kind in self.settings.kernels
        if fits and not self.survey.complete:
            both = self.survey.both.setdefault(site, Both(ours, vendor, tuple(x.stride() for x in tensors)))
            both.count += 1
        whose = self.settings.chosen.get(site, "ours") if fits else "vendor"
        self.survey.used[kind, whose] += 1
        return (ours if whose == "ours" else vendor)(*tensors, **arguments)
