"""What an engine is made of once its library has compiled it: a line a layer, with the kernel that was chosen.

A backend that can tell has `layers(onnx, component, config, directory, feed, calls)`: it opens the engine, runs it
`calls` times on `feed` (name → array) after a first, and returns its layers in the order they run. Times need counters
that cost time themselves, so their sum is more than a call takes. Or its `details` have "engine_layers", recorded when
it was built (`recorded`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Layer:
    """name: as the library calls it. type: what it computes. kernel: the implementation chosen. precision: of the
    kernel, in the library's words. seconds: median of its time in a call, None where it was not measured."""

    name: str
    type: str
    kernel: str
    precision: str
    seconds: float | None = None


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
