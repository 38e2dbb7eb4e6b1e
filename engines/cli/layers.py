"""Counting and sorting the layers of engines for `python -m engines inspect`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engines.backend import Layer


def recorded(rows: Iterable[Mapping[str, Any]]) -> list[Layer]:
    """Return the layers of rows {name, kind, kernel, milliseconds}; all but the name may be None."""
    return [Layer(row["name"] or "", row["kind"] or "", str(row["kernel"] or ""), "",
                  None if row["milliseconds"] is None else row["milliseconds"] / 1000) for row in rows]


def by_kernel(layers: Iterable[Layer]) -> list[dict[str, Any]]:
    """Return a row for each type, kernel and precision: how many layers, and their seconds; most time or layers first.
    """
    groups: dict[tuple[str, str, str], list[Layer]] = {}
    for layer in layers:
        groups.setdefault((layer.type, layer.kernel, layer.precision), []).append(layer)
    rows = [{"type": kind, "kernel": kernel, "precision": precision, "layers": len(group), "seconds": total(group)}
            for (kind, kernel, precision), group in groups.items()]
    return sorted(rows, key=lambda row: (-(row["seconds"] or 0), -row["layers"], row["type"]))


def slowest(layers: Iterable[Layer], count: int) -> list[Layer]:
    """Return the `count` layers that take most of a call."""
    return sorted(layers, key=lambda layer: -(layer.seconds or 0))[:count]


def total(layers: Sequence[Layer]) -> float | None:
    """Return the seconds of all layers that were measured, None where none was."""
    measured = [layer.seconds for layer in layers if layer.seconds is not None]
    return sum(measured) if measured else None
