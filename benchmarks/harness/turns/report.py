"""A benchmark that measures in turn writes and shows: figures as they come in, limits, a chart."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import charts, limits, measure
from benchmarks.harness.turns.contender import Contender, Measured, Workload
from benchmarks.harness.turns.rounds import LIMITS, measure_in_turn
from engines import EngineError


def compare(contenders: Mapping[str, Contender], limit: Contender, workload: Workload, args: argparse.Namespace,
            report: dict[str, Any], figures: Callable[[dict[str, Measured]], dict[str, Any]],
            show: Callable[[dict[str, Any]], None]) -> int:
    """Measure, fill `report` with limits and what `figures` makes of all, write and show it; return the exit status.

    The file is rewritten as figures come in, and a run that Ctrl-C ends shows what it has.
    """
    def after(measured: dict[str, Measured]) -> None:
        report.update(limits=limits_of(measured), **figures(measured))
        if args.json:
            measure.write_json(args.json, report)

    try:
        measure_in_turn(contenders, limit, workload, args, after)
    finally:
        if "results" in report:
            show(report)
            _show_limits(report)
    return int(any(r["left_out"] for name, r in report["results"].items() if name.startswith("latentrt")))


def limits_of(measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Return the work of one call, matrix rates and the seconds that follow; empty before the first round."""
    return limits.combine(measured[LIMITS].results)


def draw(path: Path, report: Mapping[str, Any], what: str) -> None:
    """Write the chart of the medians. what: the title, which says what was measured."""
    bars = [charts.Bar(name, r["median"]) for name, r in report["results"].items() if "median" in r]
    if not bars:
        raise EngineError(f"{path}: got no figures, expected those of one contender at least; see what was left out")
    machine = report["machine"]
    floors = {f"floor in {dtype}": seconds for dtype, seconds in report["limits"]["floor_seconds"].items()}
    charts.save(path, sorted(bars, key=lambda bar: bar.value), floors,
                f"{what}\n{report['model']}, {report['size']} pixels, "
                f"{machine.get('gpu') or str(machine['cores']) + ' cores of ' + machine['cpu']}",
                "seconds (less is better)")


def number(value: float | None, form: str, unit: str = "") -> str:
    """Return a figure as a table shows it, "-" for None."""
    return "-" if value is None else f"{value:{form}}{unit}"


def _show_limits(report: Mapping[str, Any]) -> None:
    if limit := report["limits"]:
        print(f"floor: {limit['flops'] / 1e12:.4g} TFLOP, " + ", ".join(
            f"{dtype} {limit['flop_per_second'][dtype] / 1e12:.3g} TFLOP/s = {seconds:.3g} s"
            for dtype, seconds in limit["floor_seconds"].items()))
    for name, result in report["results"].items():
        if result["left_out"]:
            print(f"left out: {name}: {result['left_out']}")
