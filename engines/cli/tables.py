"""Figures and tables as the command line prints them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """Plain columns; the last is as long as it is."""
    cells = [list(header), *([str(c) if c is not None else "" for c in line] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(line[:-1], widths, strict=False)), line[-1]])
                     for line in cells)


def size(count: float) -> str:
    """Bytes, such as "3.44 GB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def duration(seconds: float) -> str:
    """Such as "12.3 ms"."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
