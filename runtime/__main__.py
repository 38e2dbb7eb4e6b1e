"""`python -m runtime BUNDLE "prompt"`: pictures from the command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

import engines
from engines import Bundle
from engines.choice import choose
from engines.interrupt import interruptible
from engines.options import picture_size, setting
from runtime import Control, EngineError, Lora, Pipeline, Request, Result, images, tasks
from runtime.request import BLENDS, ENCODINGS, PROMPT_STYLES, TASKS
from runtime.schedulers import names

EXAMPLES = """\
examples:
  python -m runtime sd15.bundle "a photograph of an astronaut riding a horse" --seed 42 -o astronaut.png
  python -m runtime sd15.bundle "a lighthouse" --scheduler dpm++_2m_karras --steps 20 --size 512x768 --count 4
  python -m runtime sd15.bundle "a red fox" "a grey wolf" --negative "blurry" -o animals.png
  python -m runtime sd15.bundle --from astronaut.png -o again.png      the same picture again
  python -m runtime sd15.bundle "an oil painting of a fox" --image fox.jpg --strength 0.6 -o painting.png
  python -m runtime sd15.bundle "a cat on a bench" --image bench.png --mask white-is-repainted.png -o cat.png
  python -m runtime x4.bundle "a white cat" --upscale small.png -o large.png
"""


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
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
    requests = _requests(args)
    targets = _targets(args, requests)
    bundle = Bundle.open(args.bundle)
    first = tasks.resolve(requests[0], bundle.manifest, bundle.manifest.default_size)
    assert first.height and first.width
    size = first.height, first.width
    choice = choose(args.backend, args.dtype, args.device, bundle=bundle, size=size, batch=args.batch,
                    threads=args.threads)
    if args.rebuild:
        engines.build_all(bundle, choice.backend, sizes=[size], batches=[args.batch], dtype=choice.dtype,
                          device=choice.device, threads=args.threads, rebuild=True, options=dict(args.option))
    pipe = Pipeline.load(args.bundle, choice.backend, dtype=choice.dtype, device=choice.device, size=size,
                         batch=args.batch, threads=args.threads, eager=args.eager, progress=not args.quiet,
                         tile=args.tile, options=dict(args.option))
    results = pipe(requests)
    drawn = []
    for result, files in zip(results, targets, strict=True):
        for i, (image, file) in enumerate(zip(result.images, files, strict=True)):
            record = {"request": result.request_of(i).to_json(), "model": pipe.bundle.manifest.provenance,
                      "backend": pipe.backend, "dtype": pipe.dtype}
            images.save(image, file, record, force=args.force)
            drawn.append(image)
    if args.grid:
        images.save(images.grid(drawn), args.grid, force=args.force)
    _report(args, pipe, choice.why, results, targets)
    return 0


def _requests(args: argparse.Namespace) -> list[Request]:
    """The requests that the options describe; `--from` gives the start that the other options change."""
    changes = {name: value for name, value in vars(args).items()
               if name in {f.name for f in dataclasses.fields(Request)} and value is not None}
    if args.size:
        changes["height"], changes["width"] = args.size
    if args.loras and args.loose_loras:
        changes["loras"] = [dataclasses.replace(lora, strict=False) for lora in args.loras]
    if args.upscale:
        changes |= {"image": args.upscale, "task": "upscale"}
    if args.control:
        changes["control"] = tuple(map(_control, args.control))
    if args.source:
        start = Request.from_json(images.metadata(args.source)["request"])
        prompts = args.prompt or [start.prompt]
        return [dataclasses.replace(start, **{**changes, "prompt": prompt}) for prompt in prompts]
    if not args.prompt:
        raise ValueError("prompt: got none, expected at least one; or repeat a picture with --from FILE.png")
    return [Request(**{**changes, "prompt": prompt}) for prompt in args.prompt]


def _targets(args: argparse.Namespace, requests: list[Request]) -> list[list[Path]]:
    """The file of every image; names are numbered when there are several. Refuses what exists before any work."""
    total = sum(r.count for r in requests)
    paths = [args.target if total == 1 else args.target.with_stem(f"{args.target.stem}-{i}") for i in range(total)]
    for path in [*paths, *([args.grid] if args.grid else [])]:
        images.check_target(path, args.force)
    files = iter(paths)
    return [[next(files) for _ in range(r.count)] for r in requests]


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m runtime", description="Draw pictures from prompts with an exported bundle.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Any = parser.add_argument
    add("bundle", help="directory that `python -m export` wrote")
    add("prompt", nargs="*", help="what to draw; several prompts are drawn as one batch")
    add("--negative", dest="negative_prompt", metavar="TEXT", help="what to keep away from (default: nothing)")
    add("--prompt-style", choices=PROMPT_STYLES, help="weighted: (word:1.3), [word] and BREAK as in the Stable "
        "Diffusion web UI, and prompts of any length (default: plain, as in diffusers)")
    add("--embedding", dest="embeddings", action="append", metavar="[NAME=]FILE", help="textual inversion to use, a "
        ".safetensors file, whose name stands for it in the prompts; may be given again for others")
    add("--steps", type=int, metavar="N", help="solver steps (default 50)")
    add("--guidance", type=float, metavar="G", help="classifier-free guidance scale; 1 or below: off (default 7.5)")
    add("--guidance-rescale", type=float, metavar="PHI", help="0 to 1, against over-exposure (default 0)")
    add("--scheduler", metavar="NAME", help=f"diffusers class name or one of: {', '.join(names())} "
        "(default: the checkpoint's own)")
    add("--eta", type=float, help="noise share of DDIM, 0 to 1 (default 0)")
    add("--timesteps", type=lambda t: tuple(int(v) for v in t.split(",")), metavar="T,T,...",
        help="the solver's timesteps, highest first, instead of --steps")
    add("--seed", type=int, metavar="N", help="0 to 2**64-1; image i uses seed + i (default: drawn and printed)")
    add("--count", type=int, metavar="N", help="images per prompt (default 1)")
    add("--lora", dest="loras", action="append", type=_lora, metavar="FILE[:SCALE]", help="a LoRA in .safetensors, as "
        "style.safetensors:0.7; several may be given")
    add("--loose-loras", action="store_true", help="leave out those parts of a LoRA that fit no weight of the model")
    add("--size", type=picture_size, metavar="HxW", help="pixels, height first (default: the model's own)")
    picture = parser.add_argument_group("pictures to begin with", "The model says what it can do with them: python -m "
                                        "engines inspect BUNDLE.")
    add = picture.add_argument
    add("--image", metavar="FILE", help="begin with this picture, of its own size unless --size says another")
    add("--strength", type=float, metavar="S", help="0 to 1: how much of the picture is drawn anew (default 0.8; 1 for "
        "models made for inpainting; 0.3 for Stable Diffusion XL)")
    add("--mask", metavar="FILE", help="paint only where this picture is white")
    add("--blend", choices=BLENDS, help="how other models keep the rest of the picture: noised as after the last step, "
        "as before the next, or anew before every step (default current)")
    add("--paste", action="store_const", const=True, help="put the picture's own pixels back where the mask is black")
    add("--encoding", choices=ENCODINGS, help="begin with a sample of the picture's latents (default), or the mean")
    add("--depth", metavar="FILE", help="depth map, for models that take one")
    add("--upscale", metavar="FILE", help="enlarge this picture four times, with an upscaling model")
    add("--noise-level", type=int, metavar="N", help="noise in the picture that is enlarged (default 20)")
    add("--task", choices=TASKS, help="refuse to do another (default: what the pictures given say)")
    add("--control", nargs="+", action="append", metavar=("NAME FILE", "KEY=VALUE"), help="a ControlNet that is "
        "attached to the bundle, and its hint; scale=1 start=0 end=1 preprocessor=canny; may be given several times")
    xl = parser.add_argument_group("Stable Diffusion XL")
    add = xl.add_argument
    add("--original-size", type=picture_size, metavar="HxW", help="of the picture that this is like (default: its own)")
    add("--crop", type=_corner, metavar="TOP,LEFT", help="where this was cut out of it (default 0,0)")
    add("--target-size", type=picture_size, metavar="HxW", help="size that is aimed at (default: its own)")
    add("--aesthetic-score", type=float, metavar="A", help="of the refiner (default 6)")
    add("--negative-aesthetic-score", type=float, metavar="A", help="of the refiner (default 2.5)")
    add("--denoising-start", type=float, metavar="F", help="0 to 1: leave out the schedule until here; of the refiner")
    add("--denoising-end", type=float, metavar="F", help="0 to 1: leave out the schedule from here on; of the base")
    add = parser.add_argument
    add("--from", dest="source", type=Path, metavar="FILE.png", help="repeat the request stored in a picture; "
        "options given here change it")
    add("-o", "--output", dest="target", type=Path, default=Path("latentrt.png"), metavar="FILE",
        help="picture to write, numbered when there are several (default %(default)s)")
    add("--grid", type=Path, metavar="FILE", help="also write all pictures on one")
    add("--force", action="store_true", help="replace pictures that exist")
    add("--backend", default="auto", help="engine to run (default: the fastest measured here, or what is preferred; "
        "python -m engines list BUNDLE says which and why)")
    add("--dtype", default="auto", help="fp32, fp16, bf16 or auto: precision to compute in (default %(default)s)")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda:0 or auto (default): where the engine runs")
    add("--option", type=setting, action="append", default=[], metavar="NAME=VALUE", help="a setting of the backend, "
        "as python -m engines build has them")
    add("--eager", action="store_true", help="no CUDA graphs")
    add("--tile", type=int, metavar="PIXELS", help="larger pictures go through the VAE in tiles of this side, which "
        "takes less memory")
    add("--batch", type=int, default=1, metavar="N", help="images denoised together (default 1)")
    add("--threads", type=int, default=0, metavar="N", help="CPU threads (default: all cores)")
    add("--rebuild", action="store_true", help="build the engines of this size and batch again first")
    add("--json", action="store_true", help="print files, requests and timings as JSON")
    add("--quiet", action="store_true", help="no progress bars")
    add("-v", "--verbose", action="store_true", help="log what is loaded and built; tracebacks for errors")
    return parser


def _control(words: list[str]) -> Control:
    """NAME FILE KEY=VALUE … Raises ValueError."""
    options = [word.partition("=") for word in words[2:]]
    known = ("scale", "start", "end", "preprocessor")
    if len(words) < 2 or any(not value or key not in known for key, _, value in options):
        raise ValueError(f"--control: got {' '.join(words)!r}, expected NAME FILE and any of "
                         f"{', '.join(f'{key}=…' for key in known)}")
    given: dict[str, Any] = {key: value if key == "preprocessor" else float(value) for key, _, value in options}
    return Control(words[0], words[1], **given)


def _lora(text: str) -> Lora:
    try:
        return Lora.parse(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def _corner(text: str) -> tuple[int, int]:
    top, comma, left = text.partition(",")
    if not (comma and top.isdigit() and left.isdigit()):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected TOP,LEFT in pixels such as 0,128")
    return int(top), int(left)


if __name__ == "__main__":
    sys.exit(main())
