"""The options of `python -m runtime`, and the requests that they describe."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines.cli.options import picture_size, setting
from runtime import Control, Lora, Request
from runtime.pictures import save as images
from runtime.pictures import video
from runtime.request.request import BLENDS, ENCODINGS, PROMPT_STYLES, TASKS
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
  python -m runtime sd15.bundle "a woman with red hair" --frames walk.mp4 --every 10 --limit 10 -o hair.mp4
"""


LATENTS = ".npy"
"""Ending of files that hold latents, as numpy writes them."""


def requests_of(args: argparse.Namespace) -> list[Request]:
    """The requests that the options describe; `--from` gives the start that the other options change."""
    changes = {name: value for name, value in vars(args).items()
               if name in {f.name for f in dataclasses.fields(Request)} and value is not None}
    if args.size:
        changes["height"], changes["width"] = args.size
    if args.loras and args.loose_loras:
        changes["loras"] = [dataclasses.replace(lora, strict=False) for lora in args.loras]
    if args.upscale:
        changes |= {"image": args.upscale, "task": "upscale"}
    if args.latents:
        changes["latents"] = images.load_latents(Path(args.latents))
    if args.image and args.image.endswith(LATENTS):
        changes["image"] = images.load_latents(Path(args.image))
    if args.target and args.target.suffix == LATENTS:
        changes["output"] = "latent"
    if args.control:
        changes["control"] = tuple(args.control)
    if args.source:
        stored = (video if video.is_video(args.source) else images).metadata(args.source)
        start = Request.from_json(stored["request"])
        prompts = args.prompt or [start.prompt]
        return [dataclasses.replace(start, **{**changes, "prompt": prompt}) for prompt in prompts]
    if not args.prompt:
        raise ValueError("prompt: got none, expected at least one; or repeat a picture with --from FILE.png")
    return [Request(**{**changes, "prompt": prompt}) for prompt in args.prompt]


def parser(prog: str = "python -m runtime") -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog=prog, description="Draw pictures from prompts with an exported bundle.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Any = command.add_argument
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
    add("--lora", dest="loras", action="append", type=_given(Lora.parse), metavar="FILE[:SCALE]",
        help="a LoRA in .safetensors, as style.safetensors:0.7; several may be given")
    add("--loose-loras", action="store_true", help="leave out those parts of a LoRA that fit no weight of the model")
    add("--size", type=picture_size, metavar="HxW", help="pixels, height first (default: the model's own)")
    picture = command.add_argument_group("pictures to begin with", "The model says what it can do with them: python -m "
                                        "engines inspect BUNDLE.")
    add = picture.add_argument
    add("--image", metavar="FILE", help="begin with this picture, of its own size unless --size says another; "
        "FILE.npy are latents")
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
    add("--frames", metavar="FILE", help="draw every frame of this video anew: a folder of pictures, a GIF, an MP4; "
        "hints of ControlNets may be videos too. -o says what is written: FILE.mp4, FILE.gif, or a folder")
    add("--every", type=int, metavar="N", help="take every N-th frame only")
    add("--limit", type=int, metavar="N", help="take N frames at most")
    add("--task", choices=TASKS, help="refuse to do another (default: what the pictures given say)")
    add("--control", type=_given(Control.parse), action="append", metavar="NAME=FILE[:SCALE][,KEY=VALUE]",
        help="a ControlNet that is attached to the bundle, and its hint, as canny=edges.png:0.8; keys: start and end, "
        "the share of the steps that it is used in; preprocessor=canny for the edges of FILE; may be given again")
    xl = command.add_argument_group("Stable Diffusion XL")
    add = xl.add_argument
    add("--original-size", type=picture_size, metavar="HxW", help="of the picture that this is like (default: its own)")
    add("--crop", type=_corner, metavar="TOP,LEFT", help="where this was cut out of it (default 0,0)")
    add("--target-size", type=picture_size, metavar="HxW", help="size that is aimed at (default: its own)")
    add("--aesthetic-score", type=float, metavar="A", help="of the refiner (default 6)")
    add("--negative-aesthetic-score", type=float, metavar="A", help="of the refiner (default 2.5)")
    add("--refiner", type=Path, metavar="BUNDLE", help="go on with this bundle from --denoising-end on (default 0.8)")
    add("--denoising-start", type=float, metavar="F", help="0 to 1: leave out the schedule until here; of the refiner")
    add("--denoising-end", type=float, metavar="F", help="0 to 1: leave out the schedule from here on; of the base")
    add = command.add_argument
    add("--from", dest="source", type=Path, metavar="FILE.png", help="repeat the request stored in a picture or video; "
        "options given here change it")
    add("-o", "--output", dest="target", type=Path, metavar="FILE", help="picture to write, numbered when there are "
        "several (default latentrt.png, of a video latentrt in the form of --frames); FILE.npy for its latents")
    add("--latents", metavar="FILE.npy", help="start from these latents in place of noise")
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
    return command


def _given(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` as argparse wants it: its ValueError is shown."""
    def checked(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as e:
            raise argparse.ArgumentTypeError(str(e)) from e
    return checked


def _corner(text: str) -> tuple[int, int]:
    top, comma, left = text.partition(",")
    if not (comma and top.isdigit() and left.isdigit()):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected TOP,LEFT in pixels such as 0,128")
    return int(top), int(left)
