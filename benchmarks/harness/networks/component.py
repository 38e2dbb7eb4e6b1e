"""A component of a model is called again and again: who takes part, and what follows from the times.

`python -m benchmarks unet` and `vae` are this with one component each. The name of a contender ends in its precision.
One more of latentrt's engines is one line in `on_cpu.CONTENDERS`: `"latentrt-NAME-bf16": ours("NAME", "bf16")`. On a
GPU every backend of `engines.BACKENDS` takes part, with a CUDA graph and, as "eager", without.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.harness import limits, measure, random_model, turns
from benchmarks.harness.networks import on_cpu, on_gpu
from benchmarks.harness.networks.inputs import inputs, rows
from benchmarks.harness.networks.on_cpu import REFERENCE
from benchmarks.harness.turns import Contender, Measured, Workload, number
from engines import Bundle

CONTENDERS: dict[str, dict[str, Contender]] = {"cpu": on_cpu.CONTENDERS, "cuda": on_gpu.CONTENDERS}
"""Device → contenders by name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that the command of every component has."""
    names = dict.fromkeys(name for contenders in CONTENDERS.values() for name in contenders)
    turns.add_arguments(parser, list(names), rounds=10, seconds=20.0, least=3)
    parser.add_argument("--device", choices=list(CONTENDERS), default="cpu", help="default %(default)s")
    parser.add_argument("--dtype", choices=["fp32", *limits.NARROW], metavar="NAME",
                        help="with --random, precision of the bundle, and on a GPU of everyone but the reference "
                             f"(default: {random_model.DTYPE}, on a GPU fp16)")


def run(args: argparse.Namespace, component: str, what: str, techniques: Sequence[tuple[str, str]] = ()) -> int:
    """Measure a component, write and show the figures; return the exit status.

    what: one call, in words. techniques: the waterfall's, (name, contender that has it and all before it).
    """
    contenders = CONTENDERS[args.device]
    if unknown := sorted(set(args.only or ()) - set(contenders)):
        raise ValueError(f"--only: got {', '.join(unknown)} on {args.device}, expected some of {', '.join(contenders)}")
    machine = measure.machine() | (measure.gpu() if args.device == "cuda" else {})
    with turns.opened(args, component) as workload:
        bundle = Bundle.open(workload.bundle)
        report: dict[str, Any] = {
            "machine": machine, "model": bundle.manifest.family, "component": component,
            "graph": bundle.component(component).dtype, "device": workload.device,
            "size": f"{workload.height}x{workload.width}", "batch": workload.batch, "rows": rows(workload)}
        narrow = report["graph"] if report["graph"] in limits.NARROW else args.dtype or "fp16"
        chosen = turns.chosen(args, contenders, REFERENCE, report["graph"],
                              narrow if workload.device == "cuda" else None)
        status = turns.compare(chosen, Contender(_limits), workload, args, report,
                               partial(figures, workload=workload, techniques=techniques), show)
    if args.chart:
        turns.draw(args.chart, report, what)
    return status


def figures(measured: Mapping[str, Measured], workload: Workload,
            techniques: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return results by contender (rates, share of the floor, speed and error against REFERENCE) and the waterfall."""
    floors = turns.limits_of(measured).get("floor_seconds", {})
    reference = measured[REFERENCE]
    results = {name: m.figures() for name, m in measured.items() if name != turns.LIMITS}
    for name, result in results.items():
        if "median" in result:
            median = result["median"]
            result |= {"share_of_floor": floors[name[-4:]] / median}
            if workload.component == "unet":
                result |= {"steps_per_second": 1 / median, "image_steps_per_second": workload.batch / median}
            else:
                result |= {"images_per_second": workload.batch / median}
            if reference.seconds:
                result |= {"speed": results[REFERENCE]["median"] / median,
                           "rel_rms": relative_rms(measured[name].results[0], reference.results[0])}
    return {"results": results, "waterfall": waterfall(results, techniques)}


def waterfall(results: Mapping[str, Mapping[str, Any]], techniques: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return one row a technique: seconds a step with it and all before it, and how much faster than the row before."""
    rows: list[dict[str, Any]] = []
    for (_, before), (technique, name) in pairwise((*techniques[:1], *techniques)):  # the first: compared with itself
        now, last = results.get(name, {}), results.get(before, {})
        if "median" not in now or "median" not in last:
            return []
        rows.append({"technique": technique, "contender": name, "seconds": now["median"],
                     "factor": last["median"] / now["median"], "rel_rms": now.get("rel_rms")})
    return rows


def relative_rms(got: np.ndarray, expected: np.ndarray) -> float:
    """Return the RMS of the difference over the RMS of what was expected."""
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))


def show(report: Mapping[str, Any]) -> None:
    """Print what there is."""
    if timed := {name: r for name, r in report["results"].items() if "median" in r}:
        print(measure.table([_row(name, r, report) for name, r in timed.items()]))
    if steps := report["waterfall"]:
        print()
        print(measure.table([{"waterfall": s["technique"], "s/step": f"{s['seconds']:.3g}", "gain":
                              f"{s['factor']:.2f} x", "error": number(s["rel_rms"], ".1e")} for s in steps]))
        print()


def _row(name: str, r: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, str]:
    on_device = report["device"] == "cuda"
    scale, unit = (1e3, "ms") if on_device else (1, "s")
    rates = {"step/s": "steps_per_second", "image-step/s": "image_steps_per_second", "image/s": "images_per_second"}
    return {"contender": name, unit: f"{r['median'] * scale:.3f}", "p20": f"{r['p20'] * scale:.3f}",
            "p80": f"{r['p80'] * scale:.3f}", **{head: f"{r[key]:.4g}" for head, key in rates.items() if key in r},
            "speed": number(r.get("speed"), ".2f", " x"), "of floor": f"{100 * r['share_of_floor']:.0f} %",
            "error": number(r.get("rel_rms"), ".1e"), "first s": number(r["build_seconds"], ".1f"),
            "start s": number(r["load_seconds"], ".1f"), "GB": f"{r['peak_bytes'] / 1e9:.1f}",
            **({"GPU GB": f"{r['gpu_bytes'] / 1e9:.1f}"} if on_device else {})}


def _limits(workload: Workload) -> Callable[[], dict[str, Any]]:
    feed = inputs(workload)
    if workload.component == "vae_decoder":
        n, _, height, width = feed["latents"].shape
        flops = limits.vae_decoder_flops(workload.checkpoint, n, height, width)
    else:
        n, _, height, width = feed["sample"].shape
        flops = limits.unet_flops(workload.checkpoint, n, height, width, feed["encoder_hidden_states"].shape[1])
    return lambda: limits.sample(flops, workload.device)
