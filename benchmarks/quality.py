"""Prompt adherence of the shapes model: does each picture hold what its caption asks for?

Every engine draws the same 256 captions, which training never met, from the same seeds; a checker that knows nothing
of the model (models/world/adherence.py) says which pictures are right in every object, colour, size, relation and
background.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.harness import measure
from engines.check.compare import difference
from engines.cli.options import positive, setting
from models.world.adherence import Verdict, check
from models.world.layouts import held_out
from models.world.scenes import Scene
from runtime import Pipeline, Request
from runtime.pictures.save import grid

MAY_LOSE = 1.0
"""Points, of a hundred captions, that an engine may be behind the one it is held against."""


@dataclass(frozen=True)
class Drawn:
    """An engine drew these pictures: a verdict for each, and the milliseconds that a picture took.

    options: those of the engine's config.
    """

    backend: str
    dtype: str
    pictures: list[Image.Image]
    verdicts: list[Verdict]
    milliseconds: float
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return " ".join([self.backend, self.dtype, *(f"{name}={value}" for name, value in self.options)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("bundle", help="bundle of models/shapes")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--option", type=setting, action="append", default=[], metavar="NAME=VALUE",
                        help="a setting of the backend, such as fp8=linear; not of the engine of --against")
    parser.add_argument("--against", metavar="[BACKEND:]DTYPE",
                        help="draw with this engine too, such as fp32 or onnxruntime:fp32, and compare caption by "
                             f"caption; exit status 1 where it is more than {MAY_LOSE:g} point better")
    parser.add_argument("--scheduler", default="ddim")
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--captions", type=positive, default=256, metavar="N", help="how many (default %(default)s)")
    parser.add_argument("--batch", type=positive, default=8, help="images denoised together (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and every verdict")
    parser.add_argument("--grid", type=Path, metavar="FILE", help="write all pictures on one, wrong ones framed in red")


def run(args: argparse.Namespace) -> int:
    """Draw and judge; return the exit status, 1 where the engine is further behind --against than MAY_LOSE."""
    scenes = held_out(args.captions)
    drawn = _draw(args, scenes, args.backend, args.dtype, tuple(args.option))
    print(_text(args, scenes, drawn))
    figures: dict[str, Any] = {
        "machine": measure.machine(),
        "settings": {"backend": drawn.backend, "dtype": drawn.dtype, "options": dict(drawn.options),
                     "scheduler": args.scheduler, "steps": args.steps, "guidance": args.guidance},
        "adherence": shares(scenes, drawn.verdicts), "wrong": _wrong(scenes, drawn)}
    status = 0
    if args.against:
        backend, _, dtype = args.against.rpartition(":")
        reference = _draw(args, scenes, backend or drawn.backend, dtype)
        figures["against"] = {"backend": reference.backend, "dtype": reference.dtype,
                              "adherence": shares(scenes, reference.verdicts), "wrong": _wrong(scenes, reference),
                              **paired(drawn, reference)}
        print(_text(args, scenes, reference), _paired_text(drawn, reference, figures["against"]), sep="\n")
        status = int(figures["against"]["points"] < -MAY_LOSE)
    if args.json:
        measure.write_json(args.json, figures)
    if args.grid:
        grid([_framed(p, v.ok) for p, v in zip(drawn.pictures, drawn.verdicts, strict=True)]).save(args.grid)
    return status


def paired(drawn: Drawn, reference: Drawn) -> dict[str, Any]:
    """Compare two engines on the same captions and seeds.

    points: how many more of a hundred the first drew right. gained, lost: captions (by seed) that only the first drew
    right, or only the second. p: how likely flips this uneven, or more, are between engines that are equally good
    (McNemar's exact test). psnr: dB between the two pictures of a caption, the least and the median of what differs.
    """
    flips = [(v.ok, w.ok) for v, w in zip(drawn.verdicts, reference.verdicts, strict=True)]
    gained, lost = ([n for n, flip in enumerate(flips) if flip == kind] for kind in ((True, False), (False, True)))
    psnr = [difference(np.asarray(a), np.asarray(b), peak=255).psnr
            for a, b in zip(drawn.pictures, reference.pictures, strict=True)]
    finite = [value for value in psnr if math.isfinite(value)]
    n, least = len(gained) + len(lost), min(len(gained), len(lost))
    p = min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n)
    return {"points": 100 * (len(gained) - len(lost)) / len(flips), "gained": gained, "lost": lost, "p": p,
            "psnr": {"least": min(finite), "median": float(np.median(finite))} if finite else None}


def _draw(args: argparse.Namespace, scenes: Sequence[Scene], backend: str, dtype: str,
          options: tuple[tuple[str, str], ...] = ()) -> Drawn:
    pipe = Pipeline.load(args.bundle, backend, dtype=dtype, batch=args.batch, options=dict(options))
    results = pipe([Request(scene.caption, seed=i, steps=args.steps, guidance=args.guidance, scheduler=args.scheduler)
                    for i, scene in enumerate(scenes)])
    pictures = [result.images[0] for result in results]
    verdicts = [check(np.asarray(picture), scene) for picture, scene in zip(pictures, scenes, strict=True)]
    each = results[0].timings["total"] / len(results) * 1000
    return Drawn(pipe.config.backend, pipe.config.dtype, pictures, verdicts, each, options)


def _text(args: argparse.Namespace, scenes: Sequence[Scene], drawn: Drawn) -> str:
    problems = Counter(v.problems[0] for v in drawn.verdicts if not v.ok).most_common(5)
    return "\n".join([f"{drawn}, {args.scheduler}, {args.steps} steps, guidance {args.guidance:g}: "
                      f"{drawn.milliseconds:.0f} ms a picture", measure.table(shares(scenes, drawn.verdicts)),
                      *(f"  {count:3d} x {problem}" for problem, count in problems)])


def _paired_text(drawn: Drawn, reference: Drawn, pairs: dict[str, Any]) -> str:
    psnr = pairs["psnr"]
    near = f"PSNR at least {psnr['least']:.1f} dB, median {psnr['median']:.1f}" if psnr else "the same pictures"
    return (f"{drawn} against {reference}: {pairs['points']:+.1f} points; {len(pairs['gained'])} captions right only "
            f"with {drawn}, {len(pairs['lost'])} only with {reference} (p = {pairs['p']:.2g}); {near}: "
            + ("more than a point behind" if pairs["points"] < -MAY_LOSE else "not more than a point behind"))


def _wrong(scenes: Sequence[Scene], drawn: Drawn) -> list[dict[str, Any]]:
    return [{"caption": s.caption, "seed": i, "problems": list(v.problems)}
            for i, (s, v) in enumerate(zip(scenes, drawn.verdicts, strict=True)) if not v.ok]


def shares(scenes: Sequence[Scene], verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Return a row a group of captions: how many were asked for, how many pictures are right, and their share.

    The groups are all, those with seen shape-colour pairs only, those with an unseen one, and by number of objects.
    """
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
