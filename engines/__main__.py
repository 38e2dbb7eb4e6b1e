"""python -m engines {list,build,inspect,verify}: see what is there, build it, look inside, check it."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import engines
from engines import store, verify
from engines.bundle import Bundle
from engines.interrupt import interruptible
from engines.kernel_options import add_kernel_options, kernel_options
from engines.spec import DTYPES, EngineError

EXAMPLES = """examples:
  python -m engines list                                        backends of this machine
  python -m engines list sd15.bundle                            and the engines of a bundle
  python -m engines build sd15.bundle --backend openvino --dtype bf16
  python -m engines build sd15.bundle --backend onnxruntime --size 512x512 768x512 --batch 1 4
  python -m engines build sd15.bundle --backend tensorrt-rtx --device sm_89 --dtype auto
  python -m engines inspect sd15.bundle                         components, shapes, provenance
  python -m engines verify sd15.bundle                          hash every file, compare every engine again
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 where `verify` found something, 2 for an error, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    try:
        with interruptible():
            return options.run(options)
    except (EngineError, ValueError) as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing half-built was kept", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0


def _list(options: argparse.Namespace) -> int:
    backends = [_backend(name) for name in engines.BACKENDS]
    found = [_engine(bundle, path) for bundle in _bundle(options) for path in store.engine_directories(bundle)]
    if options.json:
        print(json.dumps({"backends": backends, "engines": found}, indent=1))
        return 0
    _table(["backend", "usable", "version", "devices", "dtypes"],
           [[b["name"], b["missing"] or "yes", b["version"], b["devices"], b["dtypes"]] for b in backends])
    if options.bundle:
        print()
        _engine_table(found, options.bundle)
    return 0


def _build(options: argparse.Namespace) -> int:
    bundle = Bundle.open(options.bundle)
    rest = {"threads": options.threads, "device": options.device,
            "options": {**dict(map(_option, options.option)), **kernel_options(options)}}
    paths = store.build_all(bundle, options.backend, sizes=options.size, batches=options.batch, dtype=options.dtype,
                            components=options.component, rebuild=options.rebuild, check=not options.no_check, **rest)
    found = [_engine(bundle, path) for path in paths]
    print(json.dumps(found, indent=1)) if options.json else _engine_table(found, options.bundle)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    bundle = Bundle.open(options.bundle)
    found = [_engine(bundle, path) for path in store.engine_directories(bundle)]
    if options.json:
        print(json.dumps({"manifest": bundle.manifest.to_json(), "engines": found}, indent=1))
        return 0
    manifest = bundle.manifest
    latent = manifest.latent
    print(f"{bundle.path}: {manifest.family}, format {manifest.format}, {manifest.prediction_type} prediction, "
          f"{manifest.scheduler.get('_class_name', 'unnamed')}, {'x'.join(map(str, manifest.default_size))} pixels")
    print(f"latents: {latent.channels} channels, scale {latent.scale:g}, shift {latent.shift:g}, "
          f"{latent.factor} pixels each")
    for extra in manifest.extra_channels:
        print(f"extra denoiser channels: {extra.channels} of {extra.meaning}")
    for text in manifest.text:
        print(f"text: {text.component} gives {text.hidden_layer}, {text.max_length} tokens by {text.tokenizer}")
    print()
    _table(["component", "dtype", "inputs → outputs", "sites", "size", "error against its reference"],
           [[name, c.dtype, f"{_shapes(c.inputs)} → {_shapes(c.outputs)}",
             " ".join(f"{n} {op}" for op, n in c.sites.items()), _size(sum(_bytes(bundle.path / f) for f in c.files)),
             f"{c.check.rel_rms:.1e} rel. RMS, {c.check.max_abs:.1e} max ({c.check.reference})"]
            for name, c in manifest.components.items()])
    print("\nprovenance")
    for name, value in manifest.provenance.items():
        print(f"  {name}: {value if isinstance(value, str | int | float) else json.dumps(value)}")
    print()
    _engine_table(found, options.bundle)
    return 0


def _verify(options: argparse.Namespace) -> int:
    bundle = Bundle.open(options.bundle)
    found = [_verify_files(bundle)]
    for path in store.engine_directories(bundle):
        if options.backend in (None, _backend_of(path)):
            found.append(_verify_engine(bundle, path))
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        _table(["what", "result"], [[f["name"], f["error"] or f["figures"]] for f in found])
    return 1 if any(f["error"] for f in found) else 0


def _verify_files(bundle: Bundle) -> dict[str, Any]:
    files = {**bundle.manifest.files}
    for component in bundle.manifest.components.values():
        files |= component.files
    try:
        bundle.verify(files)
    except EngineError as e:
        return {"name": "bundle files", "error": str(e), "figures": None}
    return {"name": "bundle files", "error": None, "figures": f"ok: {len(files)} files hashed"}


def _verify_engine(bundle: Bundle, path: Path) -> dict[str, Any]:
    result: dict[str, Any] = {"name": path.name, "error": None, "figures": None}
    try:
        record = _record(bundle, path)
        if why := store.stale(bundle, record):
            return {**result, "figures": f"stale, not used: {why}"}
        store.verify_files(bundle, path, record)
        if missing := engines.backend(record.config.backend).runnable(record.config):
            return {**result, "figures": f"not checked: {missing}"}
        check = verify.check(bundle, record.component, record.config, path)
        figures = "" if check.reference == verify.ITSELF else f", {check.rel_rms:.1e} rel. RMS, {check.max_abs:.1e} max"
        return {**result, "figures": f"ok{figures} (reference: {check.reference})", "check": asdict(check)}
    except EngineError as e:
        return {**result, "error": str(e)}


def _record(bundle: Bundle, path: Path) -> store.Record:
    command = f"python -m engines build {bundle.path} --backend {_backend_of(path)} --rebuild"
    return store.Record.read(path, f"build it again: {command}")


def _backend_of(path: Path) -> str:
    """By the engine's name, COMPONENT-BACKEND-KEY: its record may be damaged."""
    name = path.name.rpartition("-")[0]
    return next((backend for backend in engines.BACKENDS if name.endswith(f"-{backend}")), "BACKEND")


def _backend(name: str) -> dict[str, str | None]:
    module = engines.backend(name)
    if missing := module.available():
        return {"name": name, "missing": missing, "version": "", "devices": "", "dtypes": ""}
    return {"name": name, "missing": None, "version": module.versions()[name], "devices": ", ".join(module.devices()),
            "dtypes": ", ".join(module.dtypes())}


def _engine(bundle: Bundle, path: Path) -> dict[str, Any]:
    size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    row: dict[str, Any] = {"name": path.name, "path": str(path), "bytes": size}
    try:
        record = _record(bundle, path)
    except EngineError as e:
        return {**row, "component": path.name, "shape": "?", "dtype": "?", "state": f"damaged: {e}", "figures": ""}
    check = record.check
    figures = "not checked" if check is None else "the reference" if check.reference == verify.ITSELF else (
        f"{check.rel_rms:.1e} rel. RMS, {check.max_abs:.1e} max")
    return {**row, "component": record.component, "backend": record.config.backend, "shape": store.rows(record.config),
            "dtype": record.config.dtype, "state": _state(bundle, record), "figures": figures,
            "build_seconds": record.build_seconds, "date": record.date, "config": record.config.to_json(),
            "check": check and asdict(check)}


def _state(bundle: Bundle, record: store.Record) -> str:
    try:
        stale = store.stale(bundle, record)
    except EngineError as e:  # its backend is not installed, or the bundle no longer has the component
        return f"unusable here: {e}"
    return f"stale: {stale}" if stale else "ok"


def _engine_table(found: list[dict[str, Any]], bundle: str) -> None:
    if not found:
        print(f"no engines yet; build them with: python -m engines build {bundle} --backend openvino")
        return
    _table(["engine", "rows and pixels", "dtype", "size", "error against the fp32 reference", "state"],
           [[e["name"], e["shape"], e["dtype"], _size(e["bytes"]), e["figures"], e["state"]] for e in found])


def _table(header: list[str], lines: list[list[Any]]) -> None:
    """Plain columns; the last is as long as it is."""
    cells = [header, *([str(c) if c is not None else "" for c in line] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join([*(c.ljust(w) for c, w in zip(line[:-1], widths, strict=False)), line[-1]]))


def _shapes(specs: Sequence[engines.TensorSpec]) -> str:
    return ", ".join(f"{s.name}[{', '.join(map(str, s.shape))}]" for s in specs)


def _bytes(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _bundle(options: argparse.Namespace) -> list[Bundle]:
    return [Bundle.open(options.bundle)] if options.bundle else []


def _option(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise EngineError(f"--option: got {text!r}, expected NAME=VALUE")
    return name, value


def _picture_size(text: str) -> tuple[int, int]:
    height, separator, width = text.partition("x")
    if not separator or not height.isdecimal() or not width.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected HEIGHTxWIDTH in pixels, such as 512x768")
    return int(height), int(width)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engines", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print JSON instead of a table")
    shared.add_argument("-v", "--verbose", action="store_true", help="say what is being done")
    commands = parser.add_subparsers(required=True, metavar="{list,build,inspect,verify}")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, parents=[shared], help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    sub = command("list", _list, "list backends, what each needs, and the engines of a bundle with their state")
    sub.add_argument("bundle", nargs="?", help="bundle directory")

    sub = command("build", _build,
                  "build the engines of a bundle for static shapes and check each against the fp32 reference")
    sub.add_argument("bundle", help="bundle directory")
    sub.add_argument("--backend", required=True, choices=list(engines.BACKENDS))
    sub.add_argument("--size", nargs="+", type=_picture_size, default=(), metavar="HxW",
                     help="picture sizes (default: the model's)")
    sub.add_argument("--batch", nargs="+", type=_positive, default=(1,), metavar="N",
                     help="pictures at a time (default: 1)")
    sub.add_argument("--dtype", choices=("auto", *DTYPES), default="fp32",
                     help="precision to compute in; auto is the backend's choice for this machine (default: fp32)")
    sub.add_argument("--component", nargs="+", default=(), metavar="NAME", help="only these components")
    sub.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: the physical cores)")
    sub.add_argument("--device", default="cpu", metavar="NAME",
                     help="cpu, cuda:N or, for a GPU that is elsewhere, its architecture such as sm_89 (default: cpu)")
    add_kernel_options(sub)
    sub.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="a setting of the backend")
    sub.add_argument("--rebuild", action="store_true", help="build again what is already there")
    sub.add_argument("--no-check", action="store_true", help="skip the comparison with the reference")

    sub = command("inspect", _inspect, "show a bundle's components, shapes, kernel sites, provenance and engines")
    sub.add_argument("bundle", help="bundle directory")

    sub = command("verify", _verify,
                  "hash every file of a bundle and compare every engine again; exit status 1 if any fails")
    sub.add_argument("bundle", help="bundle directory")
    sub.add_argument("--backend", choices=list(engines.BACKENDS), help="only engines of this backend")
    return parser


if __name__ == "__main__":
    sys.exit(main())
