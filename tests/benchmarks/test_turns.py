"""Benchmarks that measure in turn: processes, rounds, memory, failures, Ctrl-C, and charts."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.harness import charts, limits, measure, turns
from benchmarks.harness.turns import Contender, Measured, Workload
from tests.tools.small import small_bundle

RATES = {"flops": 1e9, "product": 3e9, "seconds": {"bf16": 0.5, "fp32": 2.0}}


def now(workload: Workload) -> Callable[[], float]:
    """Load a contender whose result is when it ran."""
    return time.time


def cached(workload: Workload) -> Callable[[], bool]:
    """Load one that leaves a file behind at its first start; its result later is whether that is there."""
    assert workload.fresh != workload.cache.exists()
    workload.cache.mkdir(exist_ok=True)
    return workload.cache.exists


def timed(workload: Workload) -> Callable[[], turns.Timed]:
    """Load one that takes no time, and says that each call took an hour of a GPU and a megabyte of its memory."""
    taken = 0

    def run() -> turns.Timed:
        nonlocal taken
        taken += 10**6
        return turns.Timed(3600.0, "result", taken)
    return run


def broken(when: str, workload: Workload) -> Callable[[], Any]:
    def run() -> None:
        raise ValueError("cannot run\nfor several reasons")

    if when == "start":
        raise ValueError("cannot start")
    return run if when == "turn" else partial(os._exit, 3)


def rates(workload: Workload) -> Callable[[], dict[str, Any]]:
    return RATES.copy


LIMIT = Contender(rates)


@pytest.fixture
def workload(tmp_path: Path) -> Workload:
    return Workload(small_bundle(tmp_path / "bundle").path, tmp_path / "none", 64, 64, 1, tmp_path)


def measured(workload: Workload, contenders: dict[str, Contender], **options: Any) -> dict[str, Measured]:
    args = argparse.Namespace(**{"rounds": 3, "seconds": 60.0, "least": 3, "no_build": False, **options})
    return turns.measure_in_turn(contenders, LIMIT, workload, args, lambda found: None)


def test_a_round_gives_everyone_one_turn(workload: Workload) -> None:
    found = measured(workload, {"a": Contender(now), "b": Contender(now)})
    assert all(a < b for a, b in zip(found["a"].results, found["b"].results, strict=True))
    assert all(b < a for a, b in zip(found["a"].results[1:], found["b"].results, strict=False))
    assert [len(found[name].seconds) for name in ("a", "b", turns.LIMITS)] == [3, 3, 3]
    assert found["a"].peak_bytes > 10e6 and found["a"].build_seconds is None


def test_without_memory_one_ends_before_the_next_starts(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "free_memory", lambda: 0)
    found = measured(workload, {"a": Contender(now), "b": Contender(now)})
    assert max(found["a"].results) < min(found["b"].results)
    assert len(found[turns.LIMITS].results) == 6


def test_one_that_has_taken_long_gets_fewer_rounds(workload: Workload) -> None:
    assert len(measured(workload, {"a": Contender(now)}, rounds=5, seconds=0.0, least=2)["a"].seconds) == 2


def test_what_a_first_start_has_built_is_there_at_the_second(workload: Workload) -> None:
    found = measured(workload, {"a": Contender(cached, keeps=True)})["a"]
    assert found.results == [True] * 3
    assert found.build_seconds is not None and found.load_seconds is not None


def test_one_that_measures_itself_is_believed(workload: Workload) -> None:
    found = measured(workload, {"a": Contender(timed)}, seconds=1e9)["a"]
    assert found.seconds == [3600.0] * 3 and found.results == ["result"] * 3
    assert found.figures()["gpu_bytes"] == 3 * 10**6


@pytest.mark.parametrize(("when", "reason"), [
    ("start", "ValueError: cannot start"), ("turn", "ValueError: cannot run"), ("exit", "ended with status 3"),
])
def test_one_that_fails_is_left_out_and_the_others_are_measured(workload: Workload, when: str, reason: str) -> None:
    found = measured(workload, {"a": Contender(partial(broken, when)), "b": Contender(now)})
    assert reason in str(found["a"].left_out) and "\n" not in str(found["a"].left_out)
    assert found["b"].left_out is None and len(found["b"].seconds) == 3


def test_the_floor_is_work_over_rate() -> None:
    combined = limits.combine([RATES, {**RATES, "seconds": {"bf16": 0.25, "fp32": 2.0}}])
    assert combined["flop_per_second"]["bf16"] == pytest.approx(3e9 / 0.3)  # the 20th percentile of 0.25 and 0.5
    assert combined["floor_seconds"]["fp32"] == pytest.approx(1e9 / (3e9 / 2.0))
    assert combined["product_seconds"]["bf16"] == [0.5, 0.25]
    assert limits.combine([]) == {}


def test_bars_are_the_figures(tmp_path: Path) -> None:
    bars = [charts.Bar("latentrt-x", 1.5), charts.Bar("peer", 3.0), charts.Bar("other", 2.0)]
    (axes,) = charts.figure(bars, {"floor in bf16": 1.1}, "title", "seconds").axes
    assert [patch.get_width() for patch in axes.patches] == [1.5, 3.0, 2.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["latentrt-x", "peer", "other"]
    assert axes.yaxis_inverted()  # the first bar is on top
    colours = [patch.get_facecolor() for patch in axes.patches]
    assert colours[0] != colours[1] == colours[2]
    assert [line.get_xdata()[0] for line in axes.lines] == [1.1]
    assert "1.1" in axes.get_legend().get_texts()[0].get_text()
    file = tmp_path / "new" / "bars.png"
    charts.save(file, bars, {}, "title", "seconds")
    with Image.open(file) as image:
        assert (image.format, image.size) == ("PNG", (charts.WIDTH, charts.height(3)))
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def run_for_ever(directory: str) -> None:
    """Measure with the bundle there and rewrite figures.json, in a process of its own, until Ctrl-C."""
    path = Path(directory)
    args = argparse.Namespace(rounds=10**6, seconds=1e9, least=3, no_build=False, json=path / "figures.json")
    try:
        workload = Workload(path / "bundle", path, 64, 64, 1, path)
        turns.compare({"a": Contender(now), "b": Contender(now)}, LIMIT, workload, args, {},
                      lambda found: {"results": {name: m.figures() for name, m in found.items()}},
                      lambda report: print("shown"))
    except KeyboardInterrupt:
        sys.exit(130)


@pytest.mark.parametrize("everyone", [True, False], ids=["from a terminal", "to the parent alone"])
def test_ctrl_c_leaves_figures_and_no_process(tmp_path: Path, everyone: bool) -> None:
    small_bundle(tmp_path / "bundle")
    file = tmp_path / "figures.json"
    code = f"from tests.benchmarks import test_turns; test_turns.run_for_ever({str(tmp_path)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    while not file.exists() or "median" not in file.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    (os.killpg if everyone else os.kill)(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "shown" in out and "Traceback" not in errors and "leaked" not in errors
    assert json.loads(file.read_text())["results"]["b"]["load_seconds"] > 0
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a process is left")
