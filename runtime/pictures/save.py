"""Pictures from decoder output to PIL, grids, and PNG files that remember the request that made them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

KEY = "latentrt"
"""Name of the text in a PNG file, or of the entry in a video's comment, that says how it was made."""


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Return float32 [..., 3] in [0, 1] as uint8, rounding half to even as numpy and diffusers do."""
    return np.rint(image * 255.0).astype(np.uint8)


def grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Return a sheet of images of one size, `columns` across (by default nearly square), `gap` pixels between."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def save(image: Image.Image, path: Path, metadata: dict[str, Any] | None = None, force: bool = False) -> None:
    """Write a picture under a temporary name, then rename; PNG files carry `metadata` as JSON.

    Raises what `check_target` raises.
    """
    check_target(path, force)
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, json.dumps(metadata or {}, ensure_ascii=False))
    with replacing(path) as name:
        image.save(name, pnginfo=info) if path.suffix.lower() == ".png" else image.save(name)


def save_latents(latents: np.ndarray, path: Path, force: bool = False) -> None:
    """Write float32 [n, C, h, w] as numpy does, whole or not at all. Raises what `check_target` raises."""
    check_target(path, force)
    with replacing(path) as name:
        np.save(name, latents.astype(np.float32))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[str]:
    """Yield a temporary name of the same ending, which becomes `path` when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    try:
        yield name
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def load_latents(path: Path) -> np.ndarray:
    """Return the latents that `save_latents` wrote. Raises ValueError for any other file."""
    try:
        array = np.load(path, allow_pickle=False)
    except OSError as e:
        raise ValueError(f"{path}: could not be read ({e})") from e
    except (ValueError, EOFError) as e:
        raise ValueError(f"{path}: not latents that can be read, expected a file that -o FILE.npy wrote") from e
    if not isinstance(array, np.ndarray) or array.ndim not in (3, 4):
        raise ValueError(f"{path}: got an array of shape {np.shape(array)}, expected [n, C, h, w] or [C, h, w]")
    return array


def check_target(path: Path, force: bool) -> None:
    """Raise FileExistsError where `path` exists and `force` is false, ValueError for an unknown file ending."""
    if path.suffix.lower() not in (*Image.registered_extensions(), ".npy"):
        raise ValueError(f"{path}: got ending {path.suffix!r}, expected that of a picture, such as .png, or .npy")
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; choose another name or pass --force to replace it")


def metadata(path: Path) -> dict[str, Any]:
    """Return the metadata that `save` stored in a PNG file. Raises ValueError where there is none."""
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(KEY)
    except (OSError, UnidentifiedImageError) as e:
        raise ValueError(f"{path}: not a picture that can be read ({e})") from e
    if text is None:
        raise ValueError(f"{path}: got a picture without a request in it, expected a PNG file written by latentrt")
    return json.loads(text)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
