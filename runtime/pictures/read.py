"""Pictures of a request as the numbers that the models are given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

BINARY = 0.5
"""Value from which on a mask says: paint here."""

_CUBIC = -0.75
"""Parameter of the bicubic kernel that PyTorch interpolates with (Keys, 1981, has -0.5)."""


def read(value: Any, name: str) -> Image.Image:
    """Return a file, PIL image, or array [H, W] or [H, W, 3], uint8 or float in [0, 1], as a PIL image.

    Raises ValueError, naming the option, for any other value.
    """
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, (str, Path)):
        try:
            with Image.open(value) as image:
                return ImageOps.exif_transpose(image)  # as a viewer shows it; it is loaded by that
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as e:
            raise ValueError(f"{name}: {value} is not a picture that can be read ({e}); give another file") from e
    array = np.asarray(value)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or 0 in array.shape:
        raise ValueError(f"{name}: got an array of shape {array.shape}, expected [height, width, 3] or [height, width]")
    if array.dtype != np.uint8:
        if array.dtype.kind != "f" or not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"{name}: got {array.dtype} from {array.min()} to {array.max()}, expected uint8, or "
                             "floats from 0 to 1")
        array = np.rint(array * 255).astype(np.uint8)
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def pixels(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Return float32 [3, height, width] in [-1, 1], resized to `size`, (height, width), with Lanczos' filter."""
    sized = _resized(image.convert("RGB"), size, Image.Resampling.LANCZOS)
    return np.asarray(sized, np.float32).transpose(2, 0, 1) / np.float32(127.5) - np.float32(1)


def hint(image: Image.Image, size: tuple[int, int], preprocess: Callable[[Image.Image], Image.Image] | None = None,
         ) -> np.ndarray:
    """Return float32 [3, height, width] in [0, 1], as ControlNets take it, resized to `size` with Lanczos' filter.

    preprocess: makes the hint of the picture of that size.
    """
    sized = _resized(image.convert("RGB"), size, Image.Resampling.LANCZOS)
    sized = preprocess(sized) if preprocess else sized
    return np.asarray(sized, np.float32).transpose(2, 0, 1) / np.float32(255)


def soft_mask(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Return float32 [height, width] in [0, 1], of the nearest pixels; grey stays grey. size: of the latents."""
    return np.asarray(_resized(image.convert("L"), size, Image.Resampling.NEAREST), np.float32) / np.float32(255)


def hard_mask(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Return float32 [height, width], 0 or 1; resized to `size`, in pixels, before it is cut at one half."""
    sized = _resized(image.convert("L"), size, Image.Resampling.LANCZOS)
    return (np.asarray(sized, np.float32) / np.float32(255) >= BINARY).astype(np.float32)


def depth_map(value: Any, size: tuple[int, int]) -> np.ndarray:
    """Return depth in any unit as float32 [1, height, width] from -1 to 1, as models take it. size: of the latents.

    value: a file or PIL image, of any grey mode, or an array [H, W]. Raises ValueError for another one, or where all of
    it is equally deep.
    """
    array = np.asarray(value if isinstance(value, np.ndarray) else _grey(read(value, "depth")), np.float32)
    if array.ndim != 2 or not np.isfinite(array).all():
        raise ValueError(f"depth: got an array of shape {array.shape}, expected [height, width] of finite numbers")
    sized = _cubic(_cubic(array, size[0]).T, size[1]).T
    low, high = sized.min(), sized.max()
    if low == high:
        raise ValueError(f"depth: got {low:g} everywhere, expected near and far; give another depth map")
    return np.ascontiguousarray(2 * (sized - low) / (high - low) - 1)[None]


def _grey(image: Image.Image) -> Image.Image:
    return image if image.mode in ("L", "F", "I", "I;16") else image.convert("L")


def _resized(image: Image.Image, size: tuple[int, int], filter: Image.Resampling) -> Image.Image:
    return image if image.size == size[::-1] else image.resize(size[::-1], filter)


def _cubic(rows: np.ndarray, count: int) -> np.ndarray:
    """Interpolate [n, …] to [count, …] as torch.nn.functional.interpolate does with mode="bicubic"."""
    place = (np.arange(count) + 0.5) * (len(rows) / count) - 0.5
    first = np.floor(place).astype(int)
    total = np.zeros((count, *rows.shape[1:]), np.float32)
    for tap in range(-1, 3):
        distance = np.abs(place - first - tap)
        near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
        far = ((_CUBIC * distance - 5 * _CUBIC) * distance + 8 * _CUBIC) * distance - 4 * _CUBIC
        weight = np.where(distance <= 1, near, far).astype(np.float32)
        total += weight[:, None] * rows[(first + tap).clip(0, len(rows) - 1)]
    return total
