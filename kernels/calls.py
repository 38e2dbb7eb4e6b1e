"""How the ops that the runtime launches are called: artefact, grid and numbers, from shapes alone.

Needs the standard library only; what the Triton launchers do for tensors, for whoever has addresses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kernels.aot.artefact import KernelError

OPS = ("step_input", "accumulate", "guidance_step", "to_image")
"""What the runtime launches itself."""

SOURCES = (*(f"triton/{op}.py" for op in OPS), "host/step_table.py", "triton/checks.py", "aot/artefact.py", "calls.py")
"""The files that decide what these ops do and how they are launched."""

DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """One launch. name: of the artefact. grid: programs along x, y and z, from its constant BLOCK. numbers: by name."""

    name: str
    grid: Callable[[int], Shape]
    numbers: Mapping[str, int]


def call(op: str, shapes: Mapping[str, Shape], dtypes: Mapping[str, str]) -> Call:
    """The launch of `op` on arrays of these shapes and numpy dtype names, by the op's own argument names.

    Raises KernelError for another op, or a dtype that no kernel is built for.
    """
    if op == "step_input":
        images, states, *latent = shapes["state"]
        n, total, rows = math.prod(latent), shapes["times"][2], shapes["sample"][0]
        return Call(f"step_input_{_dtype(op, dtypes['sample'])}",
                    lambda block: (-(-max(n, total) // block), images, 1 + shapes["columns"][0]),
                    {"n": n, "states": states, "first": rows - images, "rows": shapes["table"][1],
                     "width": shapes["table"][2], "total": total})
    if op == "accumulate":
        n, = shapes["x"]
        return Call(f"accumulate_{_dtype(op, dtypes['x'])}", lambda block: (-(-n // block),), {"n": n})
    if op == "guidance_step":
        images, states, *latent = shapes["state"]
        n, rows = math.prod(latent), shapes["noise_pred"][0]
        return Call(f"guidance_step_{_dtype(op, dtypes['noise_pred'])}_memory{states - 1}",
                    lambda block: (-(-n // block), images),
                    {"n": n, "first": rows - images, "rows": shapes["table"][1], "draws": shapes["noise"][1]})
    if op == "to_image":
        images, _, height, width = shapes["x"]
        pixels = height * width
        return Call(f"to_image_{_dtype(op, dtypes['x'])}_planes", lambda block: (-(-pixels // (4 * block)), images),
                    {"pixels": pixels})
    raise KernelError(f"op: got {op!r}, expected one of {', '.join(OPS)}")


def _dtype(op: str, name: str) -> str:
    if name not in DTYPES:
        raise KernelError(f"{op}: got {name}, expected one of {', '.join(DTYPES)}; no kernel is built for it")
    return DTYPES[name]
