"""`python -m engines inspect`: a bundle's components, and its engines down to layers, kernels and times."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import engines
from engines import store
from engines.backend import Layer, Target
from engines.bundle import Bundle, Condition
from engines.check import verify
from engines.cli import layers
from engines.cli import tables as show
from engines.machine.cpu import resident_memory
from engines.spec import EngineError, TensorSpec

CALLS = 5
"""Profiled calls of an engine, after a first."""
LONGEST = 200
"""Characters of a recorded list that are shown."""
SHOWN = 3
"""Inputs, and outputs, of a component that are shown; parts of a UNet have dozens."""


def describe(bundle: Bundle, path: Path) -> dict[str, Any]:
    """One engine as JSON values; what its record says, or that it is damaged. Opens nothing."""
    size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    row: dict[str, Any] = {"name": path.name, "path": str(path), "bytes": size}
    try:
        record = read(bundle, path)
    except EngineError as e:
        return {**row, "component": path.name, "shape": "?", "dtype": "?", "state": f"damaged: {e}", "figures": "",
                "timing": None}
    check, timing = record.check, record.timing
    figures = "not checked" if check is None else "the reference" if check.reference == verify.ITSELF else (
        f"{check.rel_rms:.1e} rel. RMS, {check.max_abs:.1e} max")
    return {**row, "component": record.component, "backend": record.config.backend, "shape": store.rows(record.config),
            "dtype": record.config.dtype, "state": _state(bundle, record), "figures": figures,
            "build_seconds": record.build_seconds, "date": record.date, "config": record.config.to_json(),
            "check": check and asdict(check), "timing": timing and asdict(timing),
            "versions": dict(record.key.get("versions", {}))}


def read(bundle: Bundle, path: Path) -> store.Record:
    """The record of an engine. Raises EngineError with the command that makes it again where it is damaged."""
    command = f"python -m engines build {bundle.path} --backend {store.backend_of(path)} --rebuild"
    return store.Record.read(path, f"build it again: {command}")


def engine_table(found: list[dict[str, Any]], bundle: str | Path) -> str:
    """Every engine of `describe` in a line."""
    if not found:
        return f"no engines yet; build them with: python -m engines build {bundle}"
    return show.table(["engine", "rows and pixels", "dtype", "build", "call", "size",
                       "error against the fp32 reference", "state"],
                      [[e["name"], e["shape"], e["dtype"], _duration(e.get("build_seconds")),
                        _duration(e["timing"] and e["timing"]["seconds"]), show.size(e["bytes"]), e["figures"],
                        e["state"]] for e in found])


def bundle_text(bundle: Bundle) -> str:
    """What a bundle holds, for people."""
    manifest = bundle.manifest
    latent = manifest.latent
    lines = [f"{bundle.path}: {manifest.kind}, {manifest.family}, format {manifest.format}, "
             f"{manifest.prediction_type} prediction, {manifest.scheduler.get('_class_name', 'unnamed')}, "
             f"{'x'.join(map(str, manifest.default_size))} pixels",
             f"latents: {latent.channels} channels, scale {latent.scale:g}, shift {latent.shift:g}, "
             f"{latent.factor} pixels each",
             f"tasks: {', '.join(manifest.tasks)}",
             f"guidance: {manifest.guidance.form}",
             *([f"attached: {', '.join(bundle.labels)}"] if bundle.labels else [])]
    lines += [f"condition: {_told(condition)}" for condition in manifest.conditions]
    lines += [f"text: {text.component} gives {text.hidden_layer}, {text.max_length} tokens by {text.tokenizer}"
              for text in manifest.text]
    components = show.table(
        ["component", "dtype", "inputs → outputs", "sites", "size", "error against its reference"],
        [[name, c.dtype, f"{_shapes(c.inputs)} → {_shapes(c.outputs)}",
          " ".join(f"{n} {op}" for op, n in c.sites.items()), show.size(_bytes(bundle, c.files)),
          f"{c.check.rel_rms:.1e} rel. RMS, {c.check.max_abs:.1e} max ({c.check.reference})"]
         for name, c in manifest.components.items()])
    provenance = [f"  {name}: {_plain(value)}" for name, value in manifest.provenance.items()]
    return "\n".join([*lines, "", components, "", "provenance", *provenance])


def _told(condition: Condition) -> str:
    """Return a condition in words."""
    fields = f" ({', '.join(condition.fields)})" if condition.fields else ""
    channels = f", {condition.channels} channels beside the sample" if condition.channels else ""
    return f"{condition.meaning} from {condition.source}{fields} to {condition.input}{channels}"


def look_inside(bundle: Bundle, path: Path, profile: bool) -> dict[str, Any]:
    """`describe`, what the backend recorded, and what opening and running the engine shows.

    Adds "details" (of the backend), "now" (seconds of a call), "resident_bytes" (what opening and running it added to
    this process), "layers" (of `engines.backend.Layer`) and "kernels" (the same, counted by kernel), and "why" it was
    not opened or has none of these. profile: with the time of each layer. Raises EngineError for a damaged engine.
    """
    found = describe(bundle, path)
    if found["state"] != "ok":
        return {**found, "why": found["state"]}
    record = read(bundle, path)
    store.verify_files(bundle, path, record)
    config, module = record.config, engines.backend(record.config.backend)
    if details := dict(module.details(path)):
        found |= {"details": details, **_with_kernels(layers.recorded(details.pop("engine_layers", None) or []))}
    if missing := module.runnable(config):
        return {**found, "why": missing}
    component = bundle.component(record.component)
    target = Target.of(bundle, record.component, config)
    feed = verify.inputs([s.resolve(config.dims) for s in component.inputs], verify.SEED)
    before = resident_memory()
    engine = module.load(target, path)
    timing = verify.run_timed(engine, feed)[1]
    found |= {"now": timing.seconds, "resident_bytes": max(resident_memory() - before, 0), "why": None}
    del engine
    inside = module.layers(target, path, feed, CALLS if profile else 0)
    if inside is not None:
        found |= _with_kernels(inside)
    elif not found.get("layers"):
        found["why"] = f"{config.backend} does not tell of its layers"
    return found


def _with_kernels(inside: list[Layer]) -> dict[str, Any]:
    return {"layers": [asdict(layer) for layer in inside], "kernels": layers.by_kernel(inside)}


def engine_text(found: dict[str, Any], every_layer: bool, top: int) -> str:
    """What `look_inside` found, for people."""
    lines = [f"{found['name']}: {found['shape']}, {found['dtype']}, {found['state']}"]
    lines += [f"  version {name}: {value}" for name, value in found.get("versions", {}).items()]
    lines += [f"  {name}: {_brief(value)}" for name, value in found.get("details", {}).items()]
    if found.get("date"):
        lines.append(f"  built {found['date']} in {_duration(found['build_seconds'])}; {show.size(found['bytes'])} on "
                     f"disk; {found['figures']}")
    if timing := found.get("timing"):
        lines.append(f"  a call took {show.duration(timing['seconds'])} when it was built ({timing['machine']})")
    if found.get("now"):
        lines.append(f"  a call takes {show.duration(found['now'])} now; opening and running it takes "
                     f"{show.size(found['resident_bytes'])}")
    if found["why"]:
        lines.append(f"  not opened: {found['why']}" if "now" not in found else f"  {found['why']}")
    if not found.get("layers"):
        return "\n".join(lines)
    inside = [Layer(**layer) for layer in found["layers"]]
    whole = layers.total(inside)
    times = [] if whole is None else ["time", "share"]
    lines += ["", show.table([*times, "layers", "precision", "type", "kernel"],
                             [[*_time(row["seconds"], whole), row["layers"], row["precision"], row["type"],
                               row["kernel"]] for row in found["kernels"]])]
    if every_layer or times:
        shown = inside if every_layer else layers.slowest(inside, top)
        lines += ["", "every layer, in order" if every_layer else f"the {len(shown)} layers that take longest",
                  show.table([*times, "precision", "type", "kernel", "layer"],
                             [[*_time(layer.seconds, whole), layer.precision, layer.type, layer.kernel, layer.name]
                              for layer in shown])]
    return "\n".join(lines)


def _time(seconds: float | None, whole: float | None) -> list[str]:
    if whole is None:
        return []
    return ["", ""] if seconds is None else [show.duration(seconds), f"{100 * seconds / (whole or 1):.1f} %"]


def _state(bundle: Bundle, record: store.Record) -> str:
    try:
        stale = store.stale(bundle, record)
    except EngineError as e:  # its backend is not installed, or the bundle no longer has the component
        return f"unusable here: {e}"
    return f"stale: {stale}" if stale else "ok"


def _shapes(specs: tuple[TensorSpec, ...]) -> str:
    rest = [f"… {len(specs) - SHOWN} more"] if len(specs) > SHOWN else []
    return ", ".join([f"{s.name}[{', '.join(map(str, s.shape))}]" for s in specs[:SHOWN]] + rest)


def _bytes(bundle: Bundle, files: Any) -> int:
    return sum((bundle.path / f).stat().st_size for f in files if (bundle.path / f).is_file())


def _duration(seconds: float | None) -> str:
    return "" if seconds is None else show.duration(seconds)


def _brief(value: Any) -> str:
    text = _plain(value)
    return text if len(text) <= LONGEST or not isinstance(value, list | dict) else f"{len(value)} entries (see --json)"


def _plain(value: Any) -> str:
    return str(value) if isinstance(value, str | int | float) else json.dumps(value)
