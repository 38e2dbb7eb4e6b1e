"""Layers of engines as `python -m engines inspect` counts and sorts them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engines.backend import Layer


def recorded(rows: Iterable[Mapping[str, Any]]) -> list[Layer]:
    """Layers of rows {name, kind, kernel, milliseconds}; all but the name may be None."""
    return [Layer(row["name"] or "", row["kind"] or "", str(row["kernel"] or ""), "",
                  None if row["milliseconds"] is None else row["milliseconds"] / 1000) for row in rows]


def by_kernel(layers: Iterable[Layer]) -> list[dict[str, Any]]:
    """Layers of one type, kernel and precision together: how many, and their seconds; most time or layers first."""
    groups: dict[tuple[str, str, str], list[Layer]] = {}
    for layer in layers:
        groups.setdefault((layer.type, layer.kernel, layer.precision), []).append(layer)
    rows = [{"type": kind, "kernel": kernel, "precision": precision, "layers": len(group), "seconds": total(group)}
            for (kind, kernel, precision), group in groups.items()]
    return sorted(rows, key=lambda row: (-(row["seconds"] or 0), -row["layers"], row["type"]))


def slowest(layers: Iterable[Layer], count: int) -> list[Layer]:
    """The `count` layers that take most of a call."""
    return sorted(layers, key=lambda layer: -(layer.seconds or 0))[:count]


def total(layers: Sequence[Layer]) -> float | None:
    """Seconds of all that were measured, None where none was."""
    measured = [layer.seconds for layer in layers if layer.seconds is not None]
    return sum(measured) if measured else None
