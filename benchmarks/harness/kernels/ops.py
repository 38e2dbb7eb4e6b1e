"""The ops that are timed: the shapes of each, and what makes its contenders."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from benchmarks import cases
from benchmarks.harness.kernels import attention, guidance, norms, pointwise
from benchmarks.harness.kernels.bench import Bench, Setting


class Op(NamedTuple):
    """shapes: those of real models. make(case, dtype, setting): its contenders. on_cpu: latentrt has a C++ kernel."""

    shapes: tuple[Any, ...]
    make: Callable[[Any, str, Setting], Bench]
    on_cpu: bool = False


OPS = {
    "attention": Op(cases.ATTENTION, attention.make, on_cpu=True),
    "group_norm": Op(cases.GROUP_NORM, norms.make_group_norm, on_cpu=True),
    "layer_norm": Op(cases.LAYER_NORM, norms.make_layer_norm),
    "geglu": Op(cases.GEGLU, pointwise.make_geglu),
    "guidance_step": Op(cases.GUIDANCE_STEP, guidance.make),
    "to_image": Op(cases.TO_IMAGE, pointwise.make_to_image),
}
"""Name → op. `benchmarks.kernels` lists the same names, which it knows without torch."""


def make(op: str, case: Any, dtype: str, setting: Setting) -> Bench:
    """Return the contenders at one shape; `torch.compile` starts afresh, so that it compiles for this shape alone."""
    torch.compiler.reset()
    return OPS[op].make(case, dtype, setting)


def chosen(op: str, text: Iterable[str]) -> list[Any]:
    """Return the shapes of an op whose name contains one of these texts; all of them without any."""
    wanted = list(text)
    return [case for case in OPS[op].shapes if not wanted or any(part in str(case) for part in wanted)]
