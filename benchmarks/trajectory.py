"""Whole denoisings by every engine of the denoiser beside the reference's: does the error grow from step to step?

examples:
  python -m benchmarks trajectory sd15.bundle                         every engine that is built
  python -m benchmarks trajectory sd15.bundle --backend openvino --steps 50 --json trajectory.json
  python -m benchmarks trajectory sd15.bundle --scheduler dpm++_2m_karras

Each denoises the same seeded latents with its own predictions, by the runtime's own sampler and guidance; the
reference, ONNX Runtime in fp32 on the CPU, decodes both results. `python -m engines verify` compares one call of every
engine.

How to read it: PSNR and relative RMS are those of the latents after each step, against the reference's. The picture of
a 16-bit engine must have at least 35 dB of full scale, that of an fp32 engine be within 1e-3; else the exit status is
1.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import engines
from benchmarks.harness import denoising, measure
from benchmarks.harness.denoising import Trajectory
from engines import Bundle, EngineError, store
from engines.check import compare
from engines.cli.describe import read
from engines.cli.options import positive
from runtime.schedulers import make_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", choices=list(engines.BACKENDS), help="only engines of this backend")
    parser.add_argument("--engine", metavar="NAME", default="", help="only engines whose names begin so")
    parser.add_argument("--scheduler", default="ddim", metavar="NAME",
                        help="sampler, a name of `python -m runtime --help` (default %(default)s)")
    parser.add_argument("--steps", type=positive, default=20, metavar="N", help="default %(default)s")
    parser.add_argument("--guidance", type=float, default=7.5, metavar="G", help="default %(default)s")
    parser.add_argument("--seed", type=int, default=compare.SEED, metavar="N",
                        help="of the latents and the text (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure with machine and versions")


def run(args: argparse.Namespace) -> int:
    """Compare the engines that can run; return the exit status, 1 where one is not as near as it has to be."""
    bundle = Bundle.open(args.bundle)
    table = make_table(bundle.manifest.scheduler, args.steps, scheduler=args.scheduler)
    records, left_out = _engines(bundle, args.backend, args.engine)
    trajectories = denoising.compare(bundle, records, table, args.guidance, args.seed) if records else []
    if args.json:
        measure.write_json(args.json, {
            "machine": measure.machine(), "model": bundle.manifest.family, "scheduler": args.scheduler,
            "steps": args.steps, "guidance": args.guidance, "seed": args.seed,
            "trajectories": [t.to_json() for t in trajectories], "left_out": left_out})
    print(f"{args.steps} steps of {args.scheduler}, guidance {args.guidance:g}, from the same latents; "
          f"reference: {compare.REFERENCE}")
    if trajectories:
        print(_text(trajectories))
    else:
        name, _ = bundle.graph(bundle.denoiser)
        print("no engine of the denoiser to compare; build one with: "
              f"python -m engines build {args.bundle} --component {name}")
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")
    return int(any(t.fault for t in trajectories))


def _engines(bundle: Bundle, backend: str | None, name: str) -> tuple[dict[Path, store.Record], dict[str, str]]:
    """Return the denoiser's engines that can be compared (directory → record), and why others cannot (name → reason).

    The reference itself is among neither.
    """
    records: dict[Path, store.Record] = {}
    left_out: dict[str, str] = {}
    for path in store.engine_directories(bundle):
        if not path.name.startswith(name) or backend not in (None, store.backend_of(path)):
            continue
        try:
            record = read(bundle, path)
            component = bundle.manifest.components.get(record.component)
            plain = component and component.network == bundle.denoiser and not component.variant
            if not component or not plain or component.part not in ("", "body") or compare.is_reference(record.config):
                continue
            if why := store.stale(bundle, record):
                left_out[path.name] = f"stale, not used: {why}"
            elif why := engines.backend(record.config.backend).runnable(record.config):
                left_out[path.name] = why
            else:
                store.verify_files(bundle, path, record)
                records[path] = record
        except EngineError as e:
            left_out[path.name] = str(e)
    return records, left_out


def _text(trajectories: list[Trajectory]) -> str:
    ends: list[dict[str, Any]] = [
        {"engine": t.engine, "rows and pixels": store.rows(t.config), "picture PSNR dB": f"{t.picture.psnr:.1f}",
         "picture max": f"{t.picture.max_abs:.1e}", "latents rel. RMS": f"{t.latents[-1].rel_rms:.1e}",
         "result": t.fault or "ok"} for t in trajectories]
    steps: list[dict[str, Any]] = [
        {"step": n, **{t.engine: f"{d.psnr:.1f} dB, {d.rel_rms:.1e}" for t, d in zip(trajectories, row, strict=True)}}
        for n, row in enumerate(zip(*(t.latents for t in trajectories), strict=True), 1)]
    return (f"{measure.table(ends)}\n\nlatents after each step: PSNR, relative RMS\n{measure.table(steps)}")
