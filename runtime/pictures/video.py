"""Videos are folders of pictures, animated pictures such as GIFs, files such as MP4, or lists of pictures.

MP4 and its like go through PyAV (FFmpeg's libraries); sound is not kept. A video that is written holds its request, as
PNG files do: in the comment of the file, or beside the pictures of a folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from engines import EngineError
from engines.bundle.publish import publish
from runtime.pictures import read as pictures
from runtime.pictures import save as images

CONTAINERS = (".mp4", ".mov", ".mkv", ".m4v", ".avi", ".webm", ".mpg", ".mpeg")
"""Endings of files that PyAV reads."""

WRITTEN = (".mp4", ".mov", ".mkv", ".gif")
"""Endings of files that can be written; a name without an ending is a folder."""

RATE = 8.0
"""Frames a second of a video that does not say: pictures of a folder, or in a list."""

RECORD = "latentrt.json"
"""File that a folder which was written holds beside its pictures: how they were made."""

SMALLEST_RATE = Fraction(1, 100)
"""Frames a second that a file is written with at least."""


@dataclass(frozen=True)
class Clip:
    """A video in memory.

    frames: PIL, RGB. rate: frames a second. names: of the files in a folder, without their endings; else none.
    """

    frames: tuple[Image.Image, ...]
    rate: float
    names: tuple[str, ...] = ()


def read(value: Any, name: str, every: int = 1, limit: int | None = None) -> Clip:
    """Read every `every`-th frame of a video, at most `limit` of them; the rate falls with them.

    value: a file or folder, pictures as of `Request.image` in a list, or an array [n, height, width, 3]; a single
    picture is a video of one frame. name: of the option, for errors. Raises ValueError for what is no video,
    EngineError where PyAV is missing.
    """
    if isinstance(value, (str, Path)) and Path(value).is_dir():
        files = sorted((f for f in Path(value).iterdir() if _is_picture(f)), key=_natural)[::every][:limit]
        clip = Clip(tuple(pictures.read(f, name).convert("RGB") for f in files), RATE / every,
                    tuple(f.stem for f in files))
    elif isinstance(value, (str, Path)):
        reader = _container if Path(value).suffix.lower() in CONTAINERS else _animation
        rate, frames = reader(Path(value), name, every, limit)
        clip = Clip(tuple(frames), rate / every)
    elif isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim == 4):
        clip = Clip(tuple(pictures.read(frame, name).convert("RGB") for frame in value[::every][:limit]), RATE / every)
    else:
        clip = Clip((pictures.read(value, name).convert("RGB"),), RATE)
    if not clip.frames:
        raise ValueError(f"{name}: got {value}, in which there is no picture; give another folder or list")
    return clip


def write(frames: Sequence[Image.Image], path: Path, rate: float, metadata: dict[str, Any] | None = None,
          force: bool = False, names: Sequence[str] = ()) -> None:
    """Write a video, by the ending of `path`, whole or not at all; a folder without one.

    names: of a folder's pictures, by default their numbers. Raises what `check_target` raises, and EngineError for a
    folder that was not written by this function.
    """
    check_target(path, force)
    if not path.suffix:
        stems = names if len(set(names)) == len(frames) else [f"{n:05}" for n in range(len(frames))]
        with publish(path, force, RECORD) as directory:
            for frame, stem in zip(frames, stems, strict=True):
                images.save(frame, directory / f"{stem}.png", metadata)
            (directory / RECORD).write_text(json.dumps(metadata or {}, indent=1), encoding="utf8")
        return
    text = json.dumps({images.KEY: metadata or {}})
    with images.replacing(path) as name:
        if path.suffix.lower() == ".gif":
            frames[0].save(name, save_all=True, append_images=frames[1:], duration=round(1000 / rate), loop=0,
                           comment=text.encode())
        else:
            _encode(frames, name, rate, text)


def check_target(path: Path, force: bool) -> None:
    """Raise FileExistsError where `path` exists and `force` is false, ValueError for an ending that is not written."""
    if path.suffix.lower() not in ("", *WRITTEN):
        raise ValueError(f"{path}: got ending {path.suffix!r}, expected {', '.join(WRITTEN)}, or none for a folder of "
                         "pictures")
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; choose another name or pass --force to replace it")


def is_video(path: Path) -> bool:
    """Return whether `metadata` reads a file, and not `runtime.pictures.save.metadata`."""
    return path.is_dir() or path.suffix.lower() in (*CONTAINERS, ".gif")


def metadata(path: Path) -> dict[str, Any]:
    """Return the metadata that `write` stored. Raises ValueError where there is none, EngineError without PyAV."""
    if path.is_dir():
        if not (path / RECORD).is_file():
            raise ValueError(f"{path}: got a folder without {RECORD}, expected one that latentrt wrote")
        return json.loads((path / RECORD).read_text(encoding="utf8"))
    if path.suffix.lower() in CONTAINERS:
        with _opened(path, "--from") as container:
            text = container.metadata.get("comment", "")
    else:
        try:
            with Image.open(path) as image:
                text = image.info.get("comment", b"").decode(errors="replace")
        except (OSError, UnidentifiedImageError) as e:
            raise ValueError(f"{path}: not a picture that can be read ({e})") from e
    try:
        return json.loads(text)[images.KEY]
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"{path}: got a video without a request in it, expected one written by latentrt") from e


def _natural(path: Path) -> list[Any]:
    """Return a key that puts frame-2 before frame-10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in Image.registered_extensions() and path.suffix.lower() not in CONTAINERS \
        and not path.name.startswith(".")


def _animation(path: Path, name: str, every: int, limit: int | None) -> tuple[float, list[Image.Image]]:
    try:
        with Image.open(path) as image:
            if not getattr(image, "is_animated", False):
                return RATE * every, [ImageOps.exif_transpose(image).convert("RGB")]
            times, frames = [], []
            for frame in islice(ImageSequence.Iterator(image), 0, None if limit is None else every * limit, every):
                times.append(frame.info.get("duration", 0))
                frames.append(frame.convert("RGB"))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as e:
        raise ValueError(f"{name}: {path} is not a picture or video that can be read ({e}); give a folder, or one of "
                         f"{', '.join((*CONTAINERS, '.gif'))}") from e
    return 1000 * len(times) / sum(times) if sum(times) else RATE, frames


def _container(path: Path, name: str, every: int, limit: int | None) -> tuple[float, list[Image.Image]]:
    with _opened(path, name) as container:
        if not container.streams.video:
            raise ValueError(f"{name}: got {path}, in which there is no video, expected one")
        stream = container.streams.video[0]
        taken = islice(container.decode(stream), 0, None if limit is None else every * limit, every)
        return float(stream.average_rate or RATE), [frame.to_image() for frame in taken]


@contextmanager
def _opened(path: Path, name: str) -> Iterator[Any]:
    av = _av()
    try:
        with av.open(str(path)) as container:
            yield container
    except (av.error.FFmpegError, OSError) as e:
        raise ValueError(f"{name}: {path} is not a video that can be read ({e}); give another file") from e


def _encode(frames: Sequence[Image.Image], name: str, rate: float, comment: str) -> None:
    """Write H.264, or MPEG-4 part 2 where FFmpeg came without the encoder; sizes are even, as both want."""
    av = _av()
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(name, "w") as container:
        container.metadata["comment"] = comment
        stream = container.add_stream(codec, rate=max(Fraction(rate).limit_denominator(1001), SMALLEST_RATE))
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        stream.options = {"crf": "17"} if codec == "libx264" else {"q": "2"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def _av() -> Any:
    try:
        import av
    except ImportError as e:
        raise EngineError(f"videos other than GIFs and folders need PyAV ({e}); run: pip install av") from e
    return av
