"""A variant is a Triton kernel with its block sizes fixed, as the ahead-of-time build compiles it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kernels.aot.artefact import ARCHS


@dataclass(frozen=True)
class Variant:
    """A variant is one compilation of one kernel.

    op: name of the operator, also of its file. name: unique among all variants, a valid file name. kernel: the
    `triton.jit` function. signature: every argument that is not a constexpr, in the kernel's order, to its Triton type
    ("*fp16", "*bf16", "*fp32", "*u8", "i32", "i64", "fp32"). constants: the value of every constexpr. divisible:
    arguments that the launcher promises to be divisible by 16 (pointers: aligned to 16 bytes). num_warps, num_stages:
    as Triton's. archs: the compute capabilities that it is launched on, 75 for sm_75.
    """

    op: str
    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, int | float | bool | str]
    divisible: tuple[str, ...] = field(default=())
    num_warps: int = 4
    num_stages: int = 2
    archs: tuple[int, ...] = ARCHS


@dataclass(frozen=True)
class Launch:
    """A launch is for one shape: everything that the kernel is given beside its pointers, which come first.

    grid: programs along x, y and z. scalars: the value of every argument that is neither pointer nor constexpr.
    kernel, constants, num_warps, num_stages: as in `Variant`.
    """

    kernel: Any
    grid: tuple[int, int, int]
    scalars: Mapping[str, int | float]
    constants: Mapping[str, int | float | bool | str]
    num_warps: int
    num_stages: int

    def __call__(self, *pointers: Any) -> None:
        """Launch the kernel on tensors in its order; the last is one that it writes."""
        from kernels.triton.traced import traceable

        traceable(self.kernel, pointers[-1])[self.grid](
            *pointers, **self.scalars, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages)
