"""What the ahead-of-time build compiles: one Triton kernel with its types and block sizes fixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kernels.artefact import ARCHS


@dataclass(frozen=True)
class Variant:
    """One compilation of one kernel.

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
