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
from engines import store
from engines.bundle import Bundle
from engines.check import trajectory, verify
from engines.check.trajectory import Trajectory
from engines.cli import tables as show
from engines.cli.inspect import bundle_text, describe, engine_table, engine_text, look_inside, read
from engines.cli.interrupt import interruptible
from engines.cli.kernel_options import add_kernel_options, kernel_options
from engines.cli.options import picture_size, positive
from engines.spec import DTYPES, EngineError
from engines.store.choose import choose

EXAMPLES = """examples:
  python -m engines list                                        backends of this machine
  python -m engines list sd15.bundle                            and the engines of a bundle
  python -m engines build sd15.bundle                           those that auto picks here
  python -m engines build sd15.bundle --backend openvino --dtype bf16
  python -m engines build sd15.bundle --backend onnxruntime --size 512x512 768x512 --batch 1 4
  python -m engines build sd15.bundle --backend tensorrt-rtx --device sm_89 --dtype auto
  python -m engines inspect sd15.bundle                         components, shapes, provenance, engines
  python -m engines inspect sd15.bundle --engine unet-openvino --profile
                                                                kernels and what is slow in these engines
  python -m engines verify sd15.bundle                          hash every file, compare every engine again
  python -m engines verify sd15.bundle --trajectory             and over a whole denoising
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
    bundle = Bundle.open(options.bundle) if options.bundle else None
    backends = [_backend(name) for name in engines.BACKENDS]
    found = [describe(bundle, path) for path in store.engine_directories(bundle)] if bundle else []
    auto = _auto(bundle)
    if options.json:
        print(json.dumps({"backends": backends, "auto": auto, "engines": found}, indent=1))
        return 0
    print(show.table(["backend", "usable", "version", "devices", "dtypes"],
                     [[b["name"], b["missing"] or "yes", b["version"], b["devices"], b["dtypes"]] for b in backends]))
    print("\nauto: " + (auto["error"] or f"{auto['backend']} {auto['dtype']} on {auto['device']}: {auto['why']}"))
    if bundle:
        print()
        print(engine_table(found, options.bundle))
    return 0


def _auto(bundle: Bundle | None) -> dict[str, str | None]:
    """What `choose` makes of "auto" for one picture of the model's own size."""
    try:
        return {**choose(bundle=bundle)._asdict(), "error": None}
    except EngineError as e:
        return {"error": str(e)}


def _build(options: argparse.Namespace) -> int:
    bundle = Bundle.open(options.bundle)
    backend, dtype, device = options.backend, options.dtype, options.device
    if backend == "auto":
        backend, dtype, device, why = choose(
            "auto", dtype or "auto", bundle=bundle, size=next(iter(options.size), None), batch=options.batch[0],
            device=device or "auto", threads=options.threads, build=device is not None)
        print(f"auto: {backend} {dtype} on {device}: {why}", file=sys.stderr)
    rest = {"threads": options.threads, "device": device or "cpu", "tokens": options.tokens,
            "options": {**dict(map(_option, options.option)), **kernel_options(options)}}
    paths = store.build_all(bundle, backend, sizes=options.size, batches=options.batch, dtype=dtype or "fp32",
                            components=options.component, rebuild=options.rebuild, check=not options.no_check, **rest)
    found = [describe(bundle, path) for path in paths]
    print(json.dumps(found, indent=1) if options.json else engine_table(found, options.bundle))
    return 0


def _named(options: argparse.Namespace, bundle: Bundle) -> list[Path]:
    """The engines whose names begin as asked for; all where nothing was."""
    known = list(store.engine_directories(bundle))
    found = [path for path in known if path.name.startswith(options.engine or "")]
    if options.engine and not found:
        raise EngineError(f"--engine: got {options.engine!r}, expected how one of these begins: "
                          + (", ".join(path.name for path in known) or "none yet"))
    return found


def _inspect(options: argparse.Namespace) -> int:
    bundle = Bundle.open(options.bundle)
    paths = _named(options, bundle)
    if options.engine or options.layers or options.profile:
        found = [look_inside(bundle, path, options.profile) for path in paths]
        texts = (engine_text(one, options.layers, options.top) for one in found)
        print(json.dumps(found, indent=1) if options.json else "\n\n".join(texts))
        return 0
    found = [describe(bundle, path) for path in paths]
    if options.json:
        print(json.dumps({"manifest": bundle.manifest.to_json(), "engines": found}, indent=1))
        return 0
    print(bundle_text(bundle), engine_table(found, options.bundle), sep="\n\n")
    if found:
        print(f"\nlayers, kernels and what is slow: python -m engines inspect {options.bundle} --engine NAME --profile")
    return 0


def _verify(options: argparse.Namespace) -> int:
    bundle = Bundle.open(options.bundle)
    paths = [path for path in _named(options, bundle) if options.backend in (None, store.backend_of(path))]
    found = [_verify_files(bundle), *(_verify_engine(bundle, path) for path in paths)]
    trajectories = _trajectories(options, bundle, paths, found) if options.trajectory else []
    if options.json:
        print(json.dumps({"checks": found, "trajectories": [t.to_json() for t in trajectories]}, indent=1))
    else:
        print(_check_table(found))
        if options.trajectory:
            print("", _trajectory_text(trajectories, options), sep="\n")
    return 1 if any(f["error"] for f in found) or any(t.fault for t in trajectories) else 0


def _verify_files(bundle: Bundle) -> dict[str, Any]:
    files = {**bundle.manifest.files}
    for component in bundle.manifest.components.values():
        files |= component.files
    try:
        bundle.verify(files)
    except EngineError as e:
        return {"name": "bundle files", "error": str(e), "result": None, "outputs": {}}
    return {"name": "bundle files", "error": None, "result": f"ok: {len(files)} files hashed", "outputs": {}}


def _verify_engine(bundle: Bundle, path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"name": path.name, "error": None, "result": None, "outputs": {}}
    try:
        record = read(bundle, path)
        found["shape"] = store.rows(record.config)
        if why := store.stale(bundle, record):
            return {**found, "result": f"stale, not used: {why}"}
        store.verify_files(bundle, path, record)
        if missing := engines.backend(record.config.backend).runnable(record.config):
            return {**found, "result": f"not checked: {missing}"}
        measured = verify.measure(bundle, record.component, record.config, path)
        found |= {"outputs": {name: one.to_json() for name, one in measured.outputs.items()},
                  "timing": asdict(measured.timing)}
        for name, one in measured.outputs.items():
            verify.judge(name, one, measured.precision, verify.describe(record.component, record.config))
        return {**found, "result": f"ok, {measured.precision}" + ("" if measured.outputs else ": the reference")}
    except EngineError as e:
        return {**found, "error": str(e)}


def _check_table(found: list[dict[str, Any]]) -> str:
    """A line an engine, with the figures of its worst output."""
    lines = []
    for one in found:
        figures = [""] * 7
        if outputs := one["outputs"]:
            name = max(outputs, key=lambda n: (outputs[n]["nan"] + outputs[n]["inf"], outputs[n]["rel_rms"] or 0))
            worst = outputs[name]
            figures = [name + (f" (worst of {len(outputs)})" if len(outputs) > 1 else ""),
                       _number(worst["rel_rms"], ".1e"), _number(worst["max_abs"], ".1e"),
                       _number(worst["mean_abs"], ".1e"), _number(worst["psnr"], ".1f"),
                       _number(worst["cosine"], ".6f"), f"{worst['nan']}/{worst['inf']}"]
        lines.append([one["name"], one.get("shape", ""), *figures, one["error"] or one["result"]])
    return show.table(["what", "rows and pixels", "output", "rel. RMS", "max", "mean", "PSNR dB", "cosine", "NaN/Inf",
                       "result"], lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _trajectories(options: argparse.Namespace, bundle: Bundle, paths: list[Path],
                  found: list[dict[str, Any]]) -> list[Trajectory]:
    """Of the UNet engines that have just been checked and can run; the reference is not compared with itself."""
    fine = {one["name"] for one in found if one["outputs"]}
    records = {path: read(bundle, path) for path in paths if path.name in fine}
    own = {path: record for path, record in records.items() if record.component in (trajectory.UNET, trajectory.BODY)}
    return trajectory.compare(bundle, own, steps=options.steps, guidance=options.guidance) if own else []


def _trajectory_text(found: list[Trajectory], options: argparse.Namespace) -> str:
    head = (f"{options.steps} steps of DDIM, guidance {options.guidance:g}, from the same latents; "
            f"reference: {verify.REFERENCE}")
    if not found:
        return (f"{head}\nno engine of the UNet to compare; build one with: "
                f"python -m engines build {options.bundle} --component {trajectory.UNET}")
    ends = show.table(["engine", "rows and pixels", "picture PSNR dB", "picture max", "latents rel. RMS", "result"],
                      [[t.engine, store.rows(t.config), f"{t.picture.psnr:.1f}", f"{t.picture.max_abs:.1e}",
                        f"{t.latents[-1].rel_rms:.1e}", t.fault or "ok"] for t in found])
    steps = show.table(["step", *(t.engine for t in found)],
                       [[n + 1, *(f"{t.latents[n].psnr:.1f} dB, {t.latents[n].rel_rms:.1e}" for t in found)]
                        for n in range(options.steps)])
    return f"{head}\n{ends}\n\nlatents after each step: PSNR, relative RMS\n{steps}"


def _backend(name: str) -> dict[str, str | None]:
    module = engines.backend(name)
    if missing := module.available():
        return {"name": name, "missing": missing, "version": "", "devices": "", "dtypes": ""}
    return {"name": name, "missing": None, "version": module.versions()[name], "devices": ", ".join(module.devices()),
            "dtypes": ", ".join(module.dtypes())}


def _option(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise EngineError(f"--option: got {text!r}, expected NAME=VALUE")
    return name, value


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
    sub.add_argument("--backend", default="auto", choices=["auto", *engines.BACKENDS],
                     help="default: auto, which `list` explains")
    sub.add_argument("--size", nargs="+", type=picture_size, default=(), metavar="HxW",
                     help="picture sizes (default: the model's)")
    sub.add_argument("--batch", nargs="+", type=positive, default=(1,), metavar="N",
                     help="pictures at a time (default: 1)")
    sub.add_argument("--dtype", choices=("auto", *DTYPES),
                     help="precision to compute in; auto is the backend's choice for this machine, and on a GPU the "
                          "graph's (default: fp32; auto with --backend auto)")
    sub.add_argument("--tokens", type=positive, default=0, metavar="N",
                     help="of the text: 77 for each chunk of a long prompt (default: one prompt's)")
    sub.add_argument("--component", nargs="+", default=(), metavar="NAME", help="only these components")
    sub.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: the physical cores)")
    sub.add_argument("--device", metavar="NAME",
                     help="cpu, cuda:N or, for a GPU that is elsewhere, its architecture such as sm_89 (default: cpu; "
                          "what is here with --backend auto)")
    add_kernel_options(sub)
    sub.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="a setting of the backend")
    sub.add_argument("--rebuild", action="store_true", help="build again what is already there")
    sub.add_argument("--no-check", action="store_true", help="skip the comparison with the reference")

    sub = command("inspect", _inspect, "show a bundle's components, shapes, kernel sites, provenance and engines; or "
                                       "the layers, kernels, times and memory of engines")
    sub.add_argument("bundle", help="bundle directory")
    sub.add_argument("--engine", metavar="NAME", help="open the engines whose names begin so: kernels, memory, times")
    sub.add_argument("--profile", action="store_true", help="time every layer and show what takes longest")
    sub.add_argument("--layers", action="store_true", help="show every layer")
    sub.add_argument("--top", type=positive, default=15, metavar="N",
                     help="with --profile, how many layers to show (default %(default)s)")

    sub = command("verify", _verify,
                  "hash every file of a bundle and compare every engine again; exit status 1 if any fails")
    sub.add_argument("bundle", help="bundle directory")
    sub.add_argument("--backend", choices=list(engines.BACKENDS), help="only engines of this backend")
    sub.add_argument("--engine", metavar="NAME", help="only engines whose names begin so")
    sub.add_argument("--trajectory", action="store_true",
                     help="also denoise from the same latents with every engine of the UNet and with the reference")
    sub.add_argument("--steps", type=positive, default=trajectory.STEPS, metavar="N", help="default %(default)s")
    sub.add_argument("--guidance", type=float, default=trajectory.GUIDANCE, metavar="G", help="default %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
