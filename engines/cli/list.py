"""`python -m engines list`: the backends of this machine, what `auto` means, and the engines of a bundle."""

from __future__ import annotations

import argparse
import json

from engines import store
from engines.backend import BACKENDS, backend
from engines.bundle import Bundle
from engines.cli.describe import describe, engine_table
from engines.cli.tables import table
from engines.spec import EngineError
from engines.store.choose import choose

ABOUT = "list backends, what each needs, and the engines of a bundle with their state"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("bundle", nargs="?", help="bundle directory")


def run(options: argparse.Namespace) -> int:
    """Print what there is and return the exit status."""
    bundle = Bundle.open(options.bundle) if options.bundle else None
    backends = [_backend(name) for name in BACKENDS]
    engines = [describe(bundle, path) for path in store.engine_directories(bundle)] if bundle else []
    auto = _auto(bundle)
    if options.json:
        print(json.dumps({"backends": backends, "auto": auto, "engines": engines}, indent=1))
        return 0
    print(table(["backend", "usable", "version", "devices", "dtypes"],
                [[b["name"], b["missing"] or "yes", b["version"], b["devices"], b["dtypes"]] for b in backends]))
    print("\nauto: " + (auto["error"] or f"{auto['backend']} {auto['dtype']} on {auto['device']}: {auto['why']}"))
    if bundle:
        print()
        print(engine_table(engines, options.bundle))
    return 0


def _auto(bundle: Bundle | None) -> dict[str, str | None]:
    """Return what `choose` makes of "auto" for one picture of the model's own size."""
    try:
        return {**choose(bundle=bundle)._asdict(), "error": None}
    except EngineError as e:
        return {"error": str(e)}


def _backend(name: str) -> dict[str, str | None]:
    module = backend(name)
    if missing := module.available():
        return {"name": name, "missing": missing, "version": "", "devices": "", "dtypes": ""}
    return {"name": name, "missing": None, "version": module.versions()[name], "devices": ", ".join(module.devices()),
            "dtypes": ", ".join(module.dtypes())}
