"""`python -m engines verify`: the hash of every file of a bundle, and every engine compared again."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engines import store
from engines.backend import BACKENDS, backend
from engines.bundle import Bundle
from engines.check import compare
from engines.cli.describe import named, read
from engines.cli.tables import table
from engines.spec import EngineError

ABOUT = "hash every file of a bundle and compare every engine again; exit status 1 if any fails"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("bundle", help="bundle directory")
    parser.add_argument("--backend", choices=list(BACKENDS), help="only engines of this backend")
    parser.add_argument("--engine", metavar="NAME", help="only engines whose names begin so")


def run(options: argparse.Namespace) -> int:
    """Check files and engines and return the exit status, 1 where something is wrong."""
    bundle = Bundle.open(options.bundle)
    paths = [path for path in named(bundle, options.engine) if options.backend in (None, store.backend_of(path))]
    checks = [_files(bundle), *(_engine(bundle, path) for path in paths)]
    print(json.dumps({"checks": checks}, indent=1) if options.json else _table(checks))
    return 1 if any(check["error"] for check in checks) else 0


def _files(bundle: Bundle) -> dict[str, Any]:
    files = {**bundle.manifest.files}
    for component in bundle.manifest.components.values():
        files |= component.files
    try:
        bundle.verify(files)
    except EngineError as e:
        return {"name": "bundle files", "error": str(e), "result": None, "outputs": {}}
    return {"name": "bundle files", "error": None, "result": f"ok: {len(files)} files hashed", "outputs": {}}


def _engine(bundle: Bundle, path: Path) -> dict[str, Any]:
    check: dict[str, Any] = {"name": path.name, "error": None, "result": None, "outputs": {}}
    try:
        record = read(bundle, path)
        check["shape"] = store.rows(record.config)
        if why := store.stale(bundle, record):
            return {**check, "result": f"stale, not used: {why}"}
        store.verify_files(bundle, path, record)
        if missing := backend(record.config.backend).runnable(record.config):
            return {**check, "result": f"not checked: {missing}"}
        measured = compare.measure(bundle, record.component, record.config, path)
        check |= {"outputs": {name: off.to_json() for name, off in measured.outputs.items()},
                  "timing": asdict(measured.timing)}
        for name, off in measured.outputs.items():
            compare.judge(name, off, measured.precision, compare.describe(record.component, record.config))
        return {**check, "result": f"ok, {measured.precision}" + ("" if measured.outputs else ": the reference")}
    except EngineError as e:
        return {**check, "error": str(e)}


def _table(checks: Sequence[dict[str, Any]]) -> str:
    """Return a line an engine, with the figures of its worst output."""
    lines = []
    for check in checks:
        figures = [""] * 7
        if outputs := check["outputs"]:
            name = max(outputs, key=lambda n: (outputs[n]["nan"] + outputs[n]["inf"], outputs[n]["rel_rms"] or 0))
            worst = outputs[name]
            figures = [name + (f" (worst of {len(outputs)})" if len(outputs) > 1 else ""),
                       _number(worst["rel_rms"], ".1e"), _number(worst["max_abs"], ".1e"),
                       _number(worst["mean_abs"], ".1e"), _number(worst["psnr"], ".1f"),
                       _number(worst["cosine"], ".6f"), f"{worst['nan']}/{worst['inf']}"]
        lines.append([check["name"], check.get("shape", ""), *figures, check["error"] or check["result"]])
    return table(["what", "rows and pixels", "output", "rel. RMS", "max", "mean", "PSNR dB", "cosine", "NaN/Inf",
                  "result"], lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
