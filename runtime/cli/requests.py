"""The requests, and the settings of a pipeline, that a command line describes."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from engines.cli.kernel_options import kernel_options
from runtime.config import PipelineConfig
from runtime.pictures import save as images
from runtime.pictures import video
from runtime.request.option import options_of
from runtime.request.request import Request

LATENTS = ".npy"
"""Ending of files that hold latents, as numpy writes them."""


def requests_of(args: argparse.Namespace) -> list[Request]:
    """Return the requests that the options describe; `--from` gives the start that the other options change.

    Raises ValueError for a value that cannot be, or a file that holds no request or no latents.
    """
    changes = _changes(args)
    if args.source:
        stored = (video if video.is_video(args.source) else images).metadata(args.source)
        start = Request.from_json(stored["request"])
        prompts = args.prompt or [start.prompt]
        return [dataclasses.replace(start, **{**changes, "prompt": prompt}) for prompt in prompts]
    if not args.prompt:
        raise ValueError("prompt: got none, expected at least one; or repeat a picture with --from FILE.png")
    return [Request(**{**changes, "prompt": prompt}) for prompt in args.prompt]


def settings_of(args: argparse.Namespace, size: tuple[int, int]) -> PipelineConfig:
    """Return the settings of a pipeline for pictures of `size` that the options describe."""
    words = vars(args)
    settings = {name: words[name] for name, declared in options_of(PipelineConfig).items()
                if declared.flag and words[name] is not None}
    options = {**dict(args.options or {}), **kernel_options(args)}
    return PipelineConfig(**{**settings, "size": size, "progress": not args.quiet, "options": options})


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    """Return the values, by name, of the options of a request that the command line gives, the prompts apart."""
    words = vars(args)
    changes = {name: words[name] for name, declared in options_of(Request).items()
               if declared.flag and words[name] is not None}
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
    return changes
