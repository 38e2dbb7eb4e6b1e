"""The files that a command line writes: their names and their contents."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.cli.requests import LATENTS
from runtime.pictures import save as images
from runtime.pictures import video
from runtime.request.request import Request
from runtime.request.result import Result


def targets_of(args: argparse.Namespace, requests: Sequence[Request]) -> list[list[Path]]:
    """Return the file of every image of every request; names are numbered when there are several.

    Raises FileExistsError for a file that exists without --force, ValueError for an ending that is not written: before
    any work.
    """
    clips = [r.frames is not None for r in requests for _ in range(r.count)]
    target, total = args.target or _default(requests[0]), len(clips)
    paths = [target if total == 1 else target.with_stem(f"{target.stem}-{i}") for i in range(total)]
    for path, clip in zip(paths, clips, strict=True):
        (video if clip and path.suffix != LATENTS else images).check_target(path, args.force)
    if args.grid:
        images.check_target(args.grid, args.force)
    files = iter(paths)
    return [[next(files) for _ in range(r.count)] for r in requests]


def write(result: Result, files: Sequence[Path], about: Mapping[str, Any], force: bool) -> None:
    """Write the pictures of a request, its video, or its latents.

    about: what they are stored with beside the request. Raises what `targets_of` raises.
    """
    is_video = result.request.frames is not None
    if files[0].suffix == LATENTS:
        arrays = [result.latents] if is_video else [latents[None] for latents in result.latents]
        for latents, file in zip(arrays, files, strict=False):
            images.save_latents(latents, file, force=force)
    elif is_video and result.images:
        assert result.rate
        made_by = {"request": result.request.to_json(), **about}
        video.write(result.images, files[0], result.rate, made_by, force, result.names)
    else:
        for i, (image, file) in enumerate(zip(result.images, files, strict=False)):
            images.save(image, file, {"request": result.request_of(i).to_json(), **about}, force=force)


def _default(request: Request) -> Path:
    """Return a name in the working directory, for a video in the form that it came in where that can be written."""
    if request.frames is None:
        return Path("latentrt.png")
    ending = Path(request.frames).suffix.lower()
    folder = Path(request.frames).is_dir() or not ending
    return Path("latentrt" if folder else f"latentrt{ending if ending in video.WRITTEN else '.mp4'}")
