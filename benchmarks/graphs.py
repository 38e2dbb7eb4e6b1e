"""CUDA graphs on and off: the same pictures through the runtime's loop on a GPU, in turn, in one process.

examples:
  python -m benchmarks graphs sd15.bundle --backend tensorrt
  python -m benchmarks graphs build/shapes.bundle --backend inductor --steps 50 --json graphs.json

`step ms` is the denoising time over the steps and `picture ms` prompt to pixels: medians over the rounds, with the 20th
and 80th percentile. Pictures must be equal to the byte; the exit status is 1 where they are not.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import measure
from engines import BACKENDS, EngineError
from engines.cli.options import picture_size, positive
from runtime import Pipeline, Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", default="auto", choices=("auto", *BACKENDS))
    parser.add_argument("--device", default="cuda:0", metavar="NAME", help="default %(default)s")
    parser.add_argument("--size", type=picture_size, metavar="HxW", help="pixels (default: the model's own)")
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="default %(default)s")
    parser.add_argument("--steps", type=positive, default=20, metavar="N", help="default %(default)s")
    parser.add_argument("--rounds", type=positive, default=10, metavar="N", help="default %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure with machine and versions")


def run(args: argparse.Namespace) -> int:
    """Draw with graphs and without, in turn; return the exit status, 1 where pictures differ."""
    if not args.device.startswith("cuda"):
        raise EngineError(f"device: got {args.device}, expected cuda:N; a CPU has no graphs")
    pipes = {name: Pipeline.load(args.bundle, args.backend, device=args.device, size=args.size, batch=args.batch,
                                 eager=name == "eager", progress=False) for name in ("graphs", "eager")}
    request = Request("a photograph of an astronaut riding a horse", steps=args.steps, seed=0, count=args.batch)
    pictures: dict[str, np.ndarray] = {}
    seconds: dict[str, dict[str, list[float]]] = {name: {"step": [], "picture": []} for name in pipes}
    for _ in range(args.rounds):
        for name, pipe in pipes.items():
            result = pipe(request)
            pictures[name] = np.stack([np.asarray(image) for image in result.images])
            seconds[name]["step"].append(result.timings["denoise"] / args.steps)
            seconds[name]["picture"].append(result.timings["total"])
    equal = np.array_equal(pictures["graphs"], pictures["eager"])
    report: dict[str, Any] = {
        "machine": measure.machine(), "backend": pipes["graphs"].config.backend, "dtype": pipes["graphs"].config.dtype,
        "batch": args.batch, "steps": args.steps, "equal": equal,
        "results": {name: {what: measure.spread(values) for what, values in of_pipe.items()}
                    for name, of_pipe in seconds.items()}}
    if args.json:
        measure.write_json(args.json, report)
    print(measure.table([{"graphs": name, **{f"{what} ms": f"{1e3 * s['median']:.3f} ({1e3 * s['p20']:.3f} to "
                                                           f"{1e3 * s['p80']:.3f})" for what, s in spreads.items()}}
                         for name, spreads in report["results"].items()]))
    print("pictures are equal" if equal else "error: pictures differ, expected equal bytes")
    return 0 if equal else 1
