"""Tables and sizes of files as the command line prints them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """Return plain columns; the last is as long as it is."""
    cells = [list(header), *([str(c) if c is not None else "" for c in line] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(line[:-1], widths, strict=False)), line[-1]])
                     for line in cells)


def size(count: float) -> str:
    """Return bytes in words, such as "3.44 GB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
