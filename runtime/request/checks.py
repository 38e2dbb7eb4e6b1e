"""What the values of a request may be: each check raises ValueError with got, expected and what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def text(name: str, value: object) -> None:
    if not isinstance(value, str):
        hint = "; pass a list of Requests for several prompts" if isinstance(value, (list, tuple)) else ""
        raise ValueError(f"{name}: got {type(value).__name__}, expected a string{hint}")


def whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise ValueError(f"{name}: got {value!r}, expected a whole number from {low} to {high}")


def number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)) \
            or not math.isfinite(value) or not low <= value <= high:
        span = f"of at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
        raise ValueError(f"{name}: got {value!r}, expected a number {span}")


def timesteps(value: Any) -> tuple[int, ...]:
    try:
        steps = tuple(int(t) for t in value)
    except (TypeError, ValueError) as e:
        raise ValueError(f"timesteps: got {value!r}, expected whole numbers, highest first") from e
    if not steps or any(a <= b for a, b in pairwise(steps)):
        raise ValueError(f"timesteps: got {steps}, expected whole numbers, each below the one before it")
    return steps


def latents(name: str, value: Any, count: int) -> np.ndarray:
    array = np.asarray(value, np.float32)
    if array.ndim == 3:
        array = np.broadcast_to(array, (count, *array.shape))
    if array.ndim != 4 or array.shape[0] != count:
        raise ValueError(f"{name}: got shape {tuple(np.shape(value))}, expected [channels, height, width] in latents, "
                         f"or that for each of the {count} images")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: got NaN or infinite values, expected finite numbers of about unit variance")
    return array


def choice(name: str, value: object, among: Sequence[str]) -> None:
    if value not in among:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(among)}")


def pair(name: str, value: Any, low: int) -> tuple[int, int]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name}: got {value!r}, expected two whole numbers, the vertical one first")
    for number in value:
        whole(name, number, low, 2**16)
    return int(value[0]), int(value[1])


def picture(name: str, value: object) -> None:
    if value is not None and not isinstance(value, (str, Path, Image.Image, np.ndarray)):
        raise ValueError(f"{name}: got {type(value).__name__}, expected the path of a picture, a PIL image or an array")


def video(name: str, value: object) -> None:
    if isinstance(value, (list, tuple)):
        for one in value:
            picture(name, one)
    else:
        picture(name, value)


def embeddings(value: Any) -> tuple[str, ...]:
    if isinstance(value, (str, Path)) or not all(isinstance(one, (str, Path)) for one in value):
        raise ValueError(f"embeddings: got {value!r}, expected a list of FILE or NAME=FILE")
    return tuple(str(one) for one in value)
