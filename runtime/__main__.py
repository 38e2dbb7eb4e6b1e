"""`python -m runtime BUNDLE "prompt"`: pictures from the command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from engines import Bundle, store
from engines.cli.interrupt import interruptible
from engines.store.choose import choose
from runtime import EngineError, Pipeline, Request, Result
from runtime.cli.options import LATENTS, parser, requests_of
from runtime.pictures import save as images
from runtime.pictures import video
from runtime.tasks import tasks


def main(argv: Sequence[str] | None = None, prog: str = "python -m runtime") -> int:
    args = parser(prog).parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s")
    try:
        with interruptible():
            return _run(args)
    except KeyboardInterrupt:
        print("interrupted; nothing was left half written", file=sys.stderr)
        return 130
    except (EngineError, ValueError, OSError) as e:
        if args.verbose:
            raise
        print(f"error: {e}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    requests = requests_of(args)
    targets = _targets(args, requests)
    if args.refiner:
        ends = [0.8 if r.denoising_end is None else r.denoising_end for r in requests]
        begun = [dataclasses.replace(r, output="latent", denoising_end=end)
                 for r, end in zip(requests, ends, strict=True)]
        first = _open(args, args.bundle, begun)[0](begun)
        requests = [dataclasses.replace(r, image=half.latents, denoising_start=end, denoising_end=None,
                                        height=half.request.height, width=half.request.width, seed=half.request.seed)
                    for r, half, end in zip(requests, first, ends, strict=True)]
    pipe, why = _open(args, args.refiner or args.bundle, requests)
    results = pipe(requests)
    drawn: list[Image.Image] = []
    for result, files in zip(results, targets, strict=True):
        one = result.request
        each = [result.latents] if one.frames is not None else [latents[None] for latents in result.latents]
        for latents, file in zip(each if files[0].suffix == LATENTS else (), files, strict=False):
            images.save_latents(latents, file, force=args.force)
        about = {"model": pipe.bundle.manifest.provenance, "backend": pipe.backend, "dtype": pipe.dtype}
        if one.frames is not None and result.images:
            clip = video.read(one.frames, "frames", one.every, one.limit)
            video.write(result.images, files[0], clip.rate, {"request": one.to_json(), **about}, args.force, clip.names)
        else:
            for i, (image, file) in enumerate(zip(result.images, files, strict=False)):
                images.save(image, file, {"request": result.request_of(i).to_json(), **about}, force=args.force)
        drawn += result.images
    if args.grid:
        images.save(images.grid(drawn), args.grid, force=args.force)
    _report(args, pipe, why, results, targets)
    return 0


def _open(args: argparse.Namespace, path: Path, requests: list[Request]) -> tuple[Pipeline, str]:
    """The pipeline of a bundle for `requests`, and why it has the engines that it has."""
    bundle = Bundle.open(path)
    first = tasks.resolve(requests[0], bundle.manifest, bundle.manifest.default_size)
    assert first.height and first.width
    size, options = (first.height, first.width), dict(args.option)
    choice = choose(args.backend, args.dtype, args.device, bundle=bundle, size=size, batch=args.batch,
                    threads=args.threads)
    if args.rebuild:
        store.build_all(bundle, choice.backend, sizes=[size], batches=[args.batch], dtype=choice.dtype,
                          device=choice.device, threads=args.threads, rebuild=True, options=options)
    pipe = Pipeline.load(path, choice.backend, dtype=choice.dtype, device=choice.device, size=size, batch=args.batch,
                         threads=args.threads, eager=args.eager, progress=not args.quiet, tile=args.tile,
                         options=options)
    return pipe, choice.why


def _targets(args: argparse.Namespace, requests: list[Request]) -> list[list[Path]]:
    """The file of every image; names are numbered when there are several. Refuses what exists before any work."""
    clips = [r.frames is not None for r in requests for _ in range(r.count)]
    target, total = args.target or _default_target(requests[0]), len(clips)
    paths = [target if total == 1 else target.with_stem(f"{target.stem}-{i}") for i in range(total)]
    for path, clip in zip(paths, clips, strict=True):
        (video if clip and path.suffix != LATENTS else images).check_target(path, args.force)
    if args.grid:
        images.check_target(args.grid, args.force)
    files = iter(paths)
    return [[next(files) for _ in range(r.count)] for r in requests]


def _default_target(request: Request) -> Path:
    """Of a video in the form that it came in, where that can be written."""
    if request.frames is None:
        return Path("latentrt.png")
    ending = Path(request.frames).suffix.lower()
    folder = Path(request.frames).is_dir() or not ending
    return Path("latentrt" if folder else f"latentrt{ending if ending in video.WRITTEN else '.mp4'}")


def _report(args: argparse.Namespace, pipe: Pipeline, why: str, results: list[Result],
            targets: list[list[Path]]) -> None:
    timings = results[0].timings
    if args.json:
        record = {"images": [{"file": str(f), "request": r.request_of(i).to_json()}
                             for r, files in zip(results, targets, strict=True) for i, f in enumerate(files)],
                  "grid": str(args.grid) if args.grid else None, "backend": pipe.backend, "dtype": pipe.dtype,
                  "chosen": why, "seconds": {"load": pipe.load_seconds, **timings}}
        print(json.dumps(record, indent=1, ensure_ascii=False))
        return
    for result, files in zip(results, targets, strict=True):
        for i, file in enumerate(files):
            print(f"{file}  seed {result.request_of(i).seed}")
    if args.grid:
        print(args.grid)
    stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in {"load": pipe.load_seconds, **timings}.items())
    print(f"{pipe.backend} {pipe.dtype}: {stages}")


if __name__ == "__main__":
    sys.exit(main())
