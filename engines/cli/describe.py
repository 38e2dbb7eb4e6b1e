"""The engines of a bundle as every command shows them: one line each, of what their records say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engines import store
from engines.bundle import Bundle
from engines.check import compare
from engines.cli.tables import size, table
from engines.spec import EngineError
from engines.store.words import duration


def named(bundle: Bundle, start: str | None) -> list[Path]:
    """Return the engines whose names begin with `start`, all where it is None. Raises EngineError where none does."""
    engines = list(store.engine_directories(bundle))
    chosen = [path for path in engines if path.name.startswith(start or "")]
    if start and not chosen:
        raise EngineError(f"--engine: got {start!r}, expected how one of these begins: "
                          + (", ".join(path.name for path in engines) or "none yet"))
    return chosen


def read(bundle: Bundle, path: Path) -> store.Record:
    """Return the record of an engine. Raises EngineError with the command that makes it again where it is damaged."""
    command = f"python -m engines build {bundle.path} --backend {store.backend_of(path)} --rebuild"
    return store.Record.read(path, f"build it again: {command}")


def describe(bundle: Bundle, path: Path) -> dict[str, Any]:
    """Return one engine as JSON values: what its record says, or that it is damaged. Opens nothing."""
    row: dict[str, Any] = {"name": path.name, "path": str(path),
                           "bytes": sum(f.stat().st_size for f in path.rglob("*") if f.is_file())}
    try:
        record = read(bundle, path)
    except EngineError as e:
        return {**row, "component": path.name, "shape": "?", "dtype": "?", "state": f"damaged: {e}", "figures": "",
                "timing": None}
    check, timing = record.check, record.timing
    figures = "not checked" if check is None else "the reference" if check.reference == compare.ITSELF else (
        f"{check.rel_rms:.1e} rel. RMS, {check.max_abs:.1e} max")
    return {**row, "component": record.component, "backend": record.config.backend, "shape": store.rows(record.config),
            "dtype": record.config.dtype, "state": _state(bundle, record), "figures": figures,
            "build_seconds": record.build_seconds, "date": record.date, "config": record.config.to_json(),
            "check": check and asdict(check), "timing": timing and asdict(timing),
            "versions": dict(record.key.get("versions", {}))}


def engine_table(engines: Sequence[dict[str, Any]], bundle: str | Path) -> str:
    """Return a table of engines as `describe` has them, or how to build some."""
    if not engines:
        return f"no engines yet; build them with: python -m engines build {bundle}"
    return table(["engine", "rows and pixels", "dtype", "build", "call", "size", "error against the fp32 reference",
                  "state"],
                 [[e["name"], e["shape"], e["dtype"], seconds(e.get("build_seconds")),
                   seconds(e["timing"] and e["timing"]["seconds"]), size(e["bytes"]), e["figures"], e["state"]]
                  for e in engines])


def seconds(value: float | None) -> str:
    """Return a duration in words, empty for None."""
    return "" if value is None else duration(value)


def _state(bundle: Bundle, record: store.Record) -> str:
    try:
        stale = store.stale(bundle, record)
    except EngineError as e:  # its backend is not installed, or the bundle no longer has the component
        return f"unusable here: {e}"
    return f"stale: {stale}" if stale else "ok"
