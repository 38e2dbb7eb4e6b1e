"""The inside of an engine: what its backend recorded, what opening and running it shows, its layers and kernels."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engines import store
from engines.backend import Layer, Target, backend
from engines.bundle import Bundle
from engines.check import compare
from engines.cli import layers
from engines.cli.describe import describe, read, seconds
from engines.cli.tables import size, table
from engines.machine.cpu import resident_memory
from engines.store.words import duration

CALLS = 5
"""Profiled calls of an engine, after a first."""
LONGEST = 200
"""Characters of a recorded list that are shown."""


def look_inside(bundle: Bundle, path: Path, profile: bool) -> dict[str, Any]:
    """Return `describe`, what the backend recorded, and what opening and running the engine shows.

    Adds "details" (of the backend), "now" (seconds of a call), "resident_bytes" (what opening and running it added to
    this process), "layers" (of `engines.backend.Layer`) and "kernels" (the same, counted by kernel), and "why" it was
    not opened or has none of these. profile: with the time of each layer. Raises EngineError for a damaged engine.
    """
    engine = describe(bundle, path)
    if engine["state"] != "ok":
        return {**engine, "why": engine["state"]}
    record = read(bundle, path)
    store.verify_files(bundle, path, record)
    config, module = record.config, backend(record.config.backend)
    if details := dict(module.details(path)):
        engine |= {"details": details, **_with_kernels(layers.recorded(details.pop("engine_layers", None) or []))}
    if missing := module.runnable(config):
        return {**engine, "why": missing}
    target = Target.of(bundle, record.component, config)
    feed = compare.inputs(target.inputs.values(), compare.SEED)
    before = resident_memory()
    opened = module.load(target, path)
    timing = compare.run_timed(opened, feed)[1]
    engine |= {"now": timing.seconds, "resident_bytes": max(resident_memory() - before, 0), "why": None}
    del opened
    inside = module.layers(target, path, feed, CALLS if profile else 0)
    if inside is not None:
        engine |= _with_kernels(inside)
    elif not engine.get("layers"):
        engine["why"] = f"{config.backend} does not tell of its layers"
    return engine


def engine_text(engine: dict[str, Any], every_layer: bool, top: int) -> str:
    """Return what `look_inside` found, for people."""
    lines = [f"{engine['name']}: {engine['shape']}, {engine['dtype']}, {engine['state']}"]
    lines += [f"  version {name}: {value}" for name, value in engine.get("versions", {}).items()]
    lines += [f"  {name}: {_brief(value)}" for name, value in engine.get("details", {}).items()]
    if engine.get("date"):
        lines.append(f"  built {engine['date']} in {seconds(engine['build_seconds'])}; {size(engine['bytes'])} on "
                     f"disk; {engine['figures']}")
    if timing := engine.get("timing"):
        lines.append(f"  a call took {duration(timing['seconds'])} when it was built ({timing['machine']})")
    if engine.get("now"):
        lines.append(f"  a call takes {duration(engine['now'])} now; opening and running it takes "
                     f"{size(engine['resident_bytes'])}")
    if engine["why"]:
        lines.append(f"  not opened: {engine['why']}" if "now" not in engine else f"  {engine['why']}")
    return "\n".join([*lines, *_layers_text(engine, every_layer, top)])


def _layers_text(engine: dict[str, Any], every_layer: bool, top: int) -> list[str]:
    """Return the kernels, and all layers or the `top` slowest, as lines; none of an engine that tells of no layers."""
    if not engine.get("layers"):
        return []
    inside = [Layer(**layer) for layer in engine["layers"]]
    whole = layers.total(inside)
    times = [] if whole is None else ["time", "share"]
    lines = ["", table([*times, "layers", "precision", "type", "kernel"],
                       [[*_time(row["seconds"], whole), row["layers"], row["precision"], row["type"], row["kernel"]]
                        for row in engine["kernels"]])]
    if every_layer or times:
        shown = inside if every_layer else layers.slowest(inside, top)
        lines += ["", "every layer, in order" if every_layer else f"the {len(shown)} layers that take longest",
                  table([*times, "precision", "type", "kernel", "layer"],
                        [[*_time(layer.seconds, whole), layer.precision, layer.type, layer.kernel, layer.name]
                         for layer in shown])]
    return lines


def _with_kernels(inside: list[Layer]) -> dict[str, Any]:
    return {"layers": [asdict(layer) for layer in inside], "kernels": layers.by_kernel(inside)}


def _time(taken: float | None, whole: float | None) -> list[str]:
    if whole is None:
        return []
    return ["", ""] if taken is None else [duration(taken), f"{100 * taken / (whole or 1):.1f} %"]


def plain(value: Any) -> str:
    """Return a recorded value as one line."""
    return str(value) if isinstance(value, str | int | float) else json.dumps(value)


def _brief(value: Any) -> str:
    text = plain(value)
    return text if len(text) <= LONGEST or not isinstance(value, list | dict) else f"{len(value)} entries (see --json)"
