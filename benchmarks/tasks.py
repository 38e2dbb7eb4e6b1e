"""Every task on every engine: does it run, and how far are its latents from those of ONNX Runtime in fp32?

examples:
  python -m benchmarks tasks --json benchmarks/results/tasks-cpu.json     all of it; half an hour on two cores
  python -m benchmarks tasks --engines openvino-fp32 openvino-bf16        a minute or two
  python -m benchmarks tasks --only "inpaint, by blending" upscale --keep build/tasks
  python -m benchmarks tasks --list                                       names for --only

The models are tiny and random, one of every layout, and are made and exported first (nothing is downloaded). Each task
draws one picture of 64x128 pixels in three steps, with guidance, from the same seed on every engine. A figure is the
relative RMS of the latents after the last step: that of the difference over that of ONNX Runtime's latents. What they
must be is in tests/: ONNX Runtime's pictures are those of diffusers, to 1e-3 of full scale.

How to read it: `built`: TensorRT-RTX compiled each engine that the task runs for an sm_89 GPU, and this machine has
none to run them; `needs a GPU`: not even that, as engines whose weights change are built where they run. `failed`: what
happened is said below the table. `missing`: this machine lacks what the engine needs.
A figure over twice what one call of an engine may be off (engines.check.tolerance.TOLERANCE) counts as failed, as errors of
steps add up. The exit status is 1 where anything failed. With random weights figures say little of pictures: no
training has made the model forgive rounding, and guidance enlarges it.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import logging
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import engines
from benchmarks.harness import measure
from benchmarks.harness.task_cases import CASES, SIZE, STEPS, Case, Model, models
from engines import store
from engines.check import compare
from engines.check.tolerance import TOLERANCE
from runtime import Pipeline, Request

MAY_GROW = 2
"""Times the tolerance of one call that the latents of the last step may be off."""


@dataclass(frozen=True)
class Column:
    """An engine of the table. device: one that is not here is built for, and not run."""

    backend: str
    dtype: str
    device: str = "cpu"

    @property
    def missing(self) -> str | None:
        """Why there is no such engine on this machine."""
        module = engines.backend(self.backend)
        if reason := module.available():
            return str(reason)
        runs = self.device != "cpu" or self.dtype in module.dtypes()
        return None if runs else f"{self.backend} computes in {', '.join(module.dtypes())} here"


REFERENCE = "onnxruntime-fp32"
COLUMNS = {
    REFERENCE: Column("onnxruntime", "fp32"),
    "openvino-fp32": Column("openvino", "fp32"), "openvino-bf16": Column("openvino", "bf16"),
    "inductor-fp32": Column("inductor", "fp32"), "inductor-bf16": Column("inductor", "bf16"),
    "tensorrt-rtx-sm_89": Column("tensorrt-rtx", "fp32", "sm_89"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], metavar="TASK",
                        help="some of the tasks; --list names them")
    parser.add_argument("--engines", nargs="+", choices=list(COLUMNS), metavar="NAME",
                        help=f"some of: {', '.join(COLUMNS)}; the first always runs")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep models and engines there, and use those that "
                        "are there already; delete it when export has changed")
    parser.add_argument("--json", type=Path, metavar="FILE",
                        help="write every figure with machine, versions and command; rewritten as they come in")
    parser.add_argument("--list", action="store_true", help="say which tasks there are, and stop")


def run(args: argparse.Namespace) -> int:
    if args.list:
        print("\n".join(case.name for case in CASES))
        return 0
    logging.getLogger("engines").setLevel(logging.ERROR)  # what cannot run here says so in the table
    cases = [case for case in CASES if case.name in (args.only or {case.name})]
    columns = {name: one for name, one in COLUMNS.items() if name in {REFERENCE, *(args.engines or COLUMNS)}}
    report: dict[str, Any] = {
        "machine": measure.machine(), "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "size": "x".join(map(str, SIZE)), "steps": STEPS, "reference": REFERENCE,
        "missing": {name: why for name, one in columns.items() if (why := one.missing)}, "tasks": {}}
    with _directory(args.keep) as directory, tqdm(total=len(cases) * len(columns), disable=None) as bar:
        known = models(directory)
        built: dict[tuple[str, str], str | None] = {}
        try:
            for case in sorted(cases, key=lambda case: list(known).index(case.model)):  # models made one after another
                bar.set_description(f"making {case.model}")
                model = known[case.model]
                found: dict[str, Any] = {"model": case.model, "engines": {}}
                report["tasks"][case.name] = found
                request, truth = case.request(model), None
                for name, column in columns.items():
                    bar.set_description(f"{case.name}: {name}")
                    if name not in report["missing"]:
                        one, drawn = _measured(case, model, request, column, truth, built)
                        found["engines"][name] = one
                        truth = drawn if name == REFERENCE else truth
                    bar.update()
                    if args.json:
                        measure.write_json(args.json, report)
        finally:
            report["tasks"] = {case.name: report["tasks"][case.name] for case in CASES if case.name in report["tasks"]}
            print(markdown(report, list(columns)))
    if args.json:
        measure.write_json(args.json, report)
    failures = [f"{task}: {name}: {one['error']}" for task, found in report["tasks"].items()
                for name, one in found["engines"].items() if one["error"]]
    print("", *failures, *(f"missing: {name}: {why}" for name, why in report["missing"].items()), sep="\n")
    return int(bool(failures))


def markdown(report: Mapping[str, Any], columns: Sequence[str]) -> str:
    """The table that README shows."""
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    for task, found in report["tasks"].items():
        lines.append([task, *(_cell(name, found["engines"].get(name), report) for name in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(name: str, one: Mapping[str, Any] | None, report: Mapping[str, Any]) -> str:
    if one is None:
        return "missing" if name in report["missing"] else ""
    if one["error"]:
        return "failed"
    if "needs" in one:
        return "needs a GPU"
    if "built" in one:
        return "built"
    return "reference" if name == report["reference"] else f"{one['rel_rms']:.1e}"


def _measured(case: Case, model: Model, request: Request, column: Column, truth: np.ndarray | None,
              built: dict[tuple[str, str], str | None]) -> tuple[dict[str, Any], np.ndarray | None]:
    """A cell, and the latents. built: error, or None, of each engine that was built for a GPU elsewhere."""
    if column.device != "cpu":
        return _built(case, model, column, built), None
    try:
        pipe = Pipeline.load(model.bundle.path, column.backend, dtype=column.dtype, device=column.device, size=SIZE,
                             progress=False)
        latents = pipe(request).latents
    except Exception as e:
        return {"error": _line(e)}, None
    finally:
        gc.collect()
    if not np.isfinite(latents).all():
        return {"error": "its latents have NaN or Inf"}, None
    if truth is None:
        return {"error": None}, latents
    found = compare.difference(latents, truth)
    most = MAY_GROW * TOLERANCE[column.dtype]
    error = None if found.rel_rms <= most else f"got {found.rel_rms:.1e} (relative RMS), expected at most {most:.0e}"
    return {"rel_rms": found.rel_rms, "max_abs": found.max_abs, "error": error}, latents


def _built(case: Case, model: Model, column: Column, built: dict[tuple[str, str], str | None]) -> dict[str, Any]:
    """Every engine that the task runs, for a GPU that is not here."""
    if case.refits:  # tests/engines/tensorrt/test_backend.py shows that it is refused
        return {"error": None, "needs": "the GPU while it is built: option refit=true"}
    names, errors = _components(case, model, column), {}
    for name in names:
        if (model.name, name) not in built:
            try:
                for _, config in store.plan(model.bundle, column.backend, sizes=[SIZE], dtype=column.dtype,
                                            device=column.device, components=[name]):
                    store.build(model.bundle, name, config)
                built[model.name, name] = None
            except Exception as e:
                built[model.name, name] = _line(e)
        if reason := built[model.name, name]:
            errors[name] = reason
    return {"built": [name for name in names if name not in errors],
            "error": "; ".join(f"{name}: {why}" for name, why in errors.items()) or None}


def _components(case: Case, model: Model, column: Column) -> list[str]:
    """What the pipeline runs of the bundle for this task."""
    if case.video:
        unet = "unet_frames_body" if store.in_parts(model.bundle, column.backend) else "unet_frames"
        plain = _components(dataclasses.replace(case, video=False), model, column)
        return [unet if name == unet.replace("frames", "control") else name for name in plain]
    wanted = []
    nets = [f"control_net{n}" for n in range(case.nets)]
    for name in store.used(model.bundle, column.backend):
        component = model.bundle.component(name)
        if component.role == "controlnet":
            wanted += [name] * (component.network in nets)
        elif component.role == "first_stage_encoder":
            wanted += [name] * case.encodes
        else:
            wanted += [name] * (bool(nets) or component.variant != "control")
    return wanted


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextmanager
def _directory(keep: Path | None) -> Iterator[Path]:
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
    else:
        with tempfile.TemporaryDirectory(prefix="latentrt-tasks-", ignore_cleanup_errors=True) as directory:
            yield Path(directory)
