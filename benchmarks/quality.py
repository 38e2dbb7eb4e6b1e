"""Prompt adherence of the shapes model: does each picture hold what its caption asks for?

Every engine draws the same 256 captions, which training never met, from the same seeds; a checker that knows nothing
of the model (benchmarks/adherence.py) says which pictures are right in every object, colour, size, relation and
background.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import measure
from benchmarks.adherence import Verdict, check
from models.scenes import Scene, held_out
from runtime import Pipeline, Request
from runtime.images import grid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="bundle of models/shapes")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--scheduler", default="ddim")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--captions", type=int, default=256, metavar="N", help="how many (default %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images denoised together (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and every verdict")
    parser.add_argument("--grid", type=Path, metavar="FILE", help="write all pictures on one, wrong ones framed in red")


def run(args: argparse.Namespace) -> int:
    scenes = held_out(args.captions)
    pipe = Pipeline.load(args.bundle, args.backend, dtype=args.dtype, batch=args.batch)
    results = pipe([Request(scene.caption, seed=i, steps=args.steps, guidance=args.guidance, scheduler=args.scheduler)
                    for i, scene in enumerate(scenes)])
    pictures = [result.images[0] for result in results]
    verdicts = [check(np.asarray(picture), scene) for picture, scene in zip(pictures, scenes, strict=True)]
    rows = shares(scenes, verdicts)
    print(f"{pipe.backend} {pipe.dtype}, {args.scheduler}, {args.steps} steps, guidance {args.guidance:g}: "
          f"{results[0].timings['total'] / len(results) * 1000:.0f} ms a picture")
    print(measure.table(rows))
    for problem, count in Counter(v.problems[0] for v in verdicts if not v.ok).most_common(5):
        print(f"  {count:3d} x {problem}")
    if args.json:
        settings = {"backend": pipe.backend, "dtype": pipe.dtype, "scheduler": args.scheduler, "steps": args.steps,
                    "guidance": args.guidance}
        wrong = [{"caption": s.caption, "seed": i, "problems": list(v.problems)}
                 for i, (s, v) in enumerate(zip(scenes, verdicts, strict=True)) if not v.ok]
        measure.write_json(args.json, {"machine": measure.machine(), "settings": settings, "adherence": rows,
                                       "wrong": wrong})
    if args.grid:
        grid([_framed(p, v.ok) for p, v in zip(pictures, verdicts, strict=True)]).save(args.grid)
    return 0


def shares(scenes: Sequence[Scene], verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Captions, right pictures and their share: all, with seen shape-colour pairs only, with an unseen one; by size."""
    groups = {"all": [True] * len(scenes), "seen pairs": [not s.unseen for s in scenes],
              "an unseen pair": [s.unseen for s in scenes]}
    groups |= {f"{n} object{'s' * (n > 1)}": [len(s.objects) == n for s in scenes] for n in (1, 2, 3)}
    rows = []
    for name, members in groups.items():
        ok = [v.ok for v, member in zip(verdicts, members, strict=True) if member]
        rows.append({"captions": name, "asked": len(ok), "right": sum(ok),
                     "share": f"{100 * sum(ok) / max(len(ok), 1):.1f} %"})
    return rows


def _framed(picture: Image.Image, ok: bool) -> Image.Image:
    frame = Image.new("RGB", (picture.width + 4, picture.height + 4), "white" if ok else "red")
    frame.paste(picture, (2, 2))
    return frame
