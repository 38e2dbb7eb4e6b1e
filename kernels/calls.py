"""The runtime's launches follow from shapes alone: artefact, grid and numbers of every op.

Needs the standard library only; what the Triton launchers do for tensors, for whoever has addresses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kernels.aot.artefact import KernelError

DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Dtypes = Mapping[str, str]


@dataclass(frozen=True)
class Call:
    """A call is one launch.

    name: of the artefact. grid: programs along x, y and z, from its constant BLOCK. numbers: by name.
    """

    name: str
    grid: Callable[[int], Shape]
    numbers: Mapping[str, int]


def call(op: str, shapes: Shapes, dtypes: Dtypes) -> Call:
    """Return the launch of `op` on arrays of these shapes and numpy dtype names, by the op's own argument names.

    Raises KernelError for another op, or a dtype that no kernel is built for.
    """
    if op not in _CALLS:
        raise KernelError(f"op: got {op!r}, expected one of {', '.join(OPS)}")
    return _CALLS[op](shapes, dtypes)


def _step_input(shapes: Shapes, dtypes: Dtypes) -> Call:
    images, states, *latent = shapes["state"]
    n, total, rows = math.prod(latent), shapes["times"][2], shapes["sample"][0]
    return Call(f"step_input_{_dtype('step_input', dtypes['sample'])}",
                lambda block: (-(-max(n, total) // block), images, 1 + shapes["columns"][0]),
                {"n": n, "states": states, "first": rows - images, "rows": shapes["table"][1],
                 "width": shapes["table"][2], "total": total})


def _accumulate(shapes: Shapes, dtypes: Dtypes) -> Call:
    n, = shapes["x"]
    return Call(f"accumulate_{_dtype('accumulate', dtypes['x'])}", lambda block: (-(-n // block),), {"n": n})


def _guidance_step(shapes: Shapes, dtypes: Dtypes) -> Call:
    images, states, *latent = shapes["state"]
    n, rows = math.prod(latent), shapes["noise_pred"][0]
    return Call(f"guidance_step_{_dtype('guidance_step', dtypes['noise_pred'])}_memory{states - 1}",
                lambda block: (-(-n // block), images),
                {"n": n, "first": rows - images, "rows": shapes["table"][1], "draws": shapes["noise"][1]})


def _to_image(shapes: Shapes, dtypes: Dtypes) -> Call:
    images, _, height, width = shapes["x"]
    pixels = height * width
    return Call(f"to_image_{_dtype('to_image', dtypes['x'])}_planes", lambda block: (-(-pixels // (4 * block)), images),
                {"pixels": pixels})


def _dtype(op: str, name: str) -> str:
    if name not in DTYPES:
        raise KernelError(f"{op}: got {name}, expected one of {', '.join(DTYPES)}; no kernel is built for it")
    return DTYPES[name]


_CALLS: dict[str, Callable[[Shapes, Dtypes], Call]] = {
    "step_input": _step_input, "accumulate": _accumulate, "guidance_step": _guidance_step, "to_image": _to_image}
OPS = tuple(_CALLS)
"""Ops that the runtime launches itself."""
