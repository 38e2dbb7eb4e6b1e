"""Charts of medians as horizontal bars, PNG files for the README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines import EngineError

WIDTH = 1200
"""Width of a chart in pixels; its height follows from the number of bars."""
OURS, PEER, FLOOR, INK = "#d9480f", "#adb5bd", "#1864ab", "#212529"


@dataclass(frozen=True)
class Bar:
    """A bar stands for one contender: its name and its value."""

    name: str
    value: float

    @property
    def ours(self) -> bool:
        """Return whether it is latentrt's."""
        return self.name.startswith("latentrt")


def require() -> None:
    """Raise EngineError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as e:
        raise EngineError("--chart: matplotlib is missing; run: pip install 'latentrt[benchmarks]'") from e


def height(bars: int) -> int:
    """Return the height in pixels of a chart of so many bars."""
    return 190 + 52 * bars


def figure(bars: Sequence[Bar], floors: Mapping[str, float], title: str, label: str) -> Any:
    """Return a matplotlib Figure: bars from top to bottom, latentrt's in colour, floors (name → value) as dashed lines.

    title: what was measured. label: the axis's, with its unit. It is drawn on white, so that it reads on any page.
    """
    from matplotlib.figure import Figure

    dpi = 150
    drawn = Figure(figsize=(WIDTH / dpi, height(len(bars)) / dpi), dpi=dpi, facecolor="white", layout="constrained")
    axes = drawn.add_subplot()
    values = [bar.value for bar in bars]
    rectangles = axes.barh(range(len(bars)), values, color=[OURS if bar.ours else PEER for bar in bars], height=0.72)
    axes.bar_label(rectangles, labels=[f"{value:.3g}" for value in values], padding=4, color=INK, fontsize=8)
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars], color=INK, fontsize=8)
    for bar, tick in zip(bars, axes.get_yticklabels(), strict=True):
        tick.set_fontweight("bold" if bar.ours else "normal")
    axes.invert_yaxis()
    for style, (name, value) in zip(("--", ":"), floors.items(), strict=False):
        axes.axvline(value, color=FLOOR, linestyle=style, linewidth=1.2, label=f"{name}: {value:.3g}")
    if floors:
        axes.legend(loc="upper right", fontsize=7, framealpha=1)
    axes.set_xlim(0, 1.12 * max([*values, *floors.values()]))
    axes.set_title(title, loc="left", color=INK, fontsize=9)
    axes.set_xlabel(label, color=INK, fontsize=8)
    axes.tick_params(axis="x", labelsize=8, colors=INK)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return drawn


def save(path: Path, bars: Sequence[Bar], floors: Mapping[str, float], title: str, label: str) -> None:
    """Write the chart under a temporary name, then rename. Raises EngineError where matplotlib is missing."""
    require()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    figure(bars, floors, title, label).savefig(temporary, format="png")
    temporary.replace(path)
