"""Checks of the values of options, which raise ValueError with got, expected and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engines.cli.options import picture_size


@dataclass(frozen=True)
class Check:
    """A rule for the values of an option, and for the words that stand for them on the command line.

    accept: (name, value) to the value as it is kept. Raises ValueError, naming the option. parse: a word of the command
    line to a value. metavar: stands for such a word in a help text. choices: all words there are, () for any. boolean:
    True or False, a flag without a word.
    """

    accept: Callable[[str, Any], Any]
    parse: Callable[[str], Any] = str
    metavar: str = "TEXT"
    choices: tuple[str, ...] = ()
    boolean: bool = False

    def __call__(self, name: str, value: Any) -> Any:
        return self.accept(name, value)


def text(metavar: str = "TEXT") -> Check:
    """Accept any string."""
    def accept(name: str, value: object) -> object:
        if not isinstance(value, str):
            hint = "; pass a list of Requests for several prompts" if isinstance(value, (list, tuple)) else ""
            raise ValueError(f"{name}: got {type(value).__name__}, expected a string{hint}")
        return value

    return Check(accept, metavar=metavar)


def short_name(example: str) -> Check:
    """Accept a string that names something, as `example` does."""
    def accept(name: str, value: object) -> object:
        if not isinstance(value, str):
            raise ValueError(f"{name}: got {value!r}, expected a name such as {example!r}, or None")
        return value

    return Check(accept, metavar="NAME")


def choice(*among: str) -> Check:
    """Accept one of a few strings."""
    def accept(name: str, value: object) -> object:
        if value not in among:
            raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(among)}")
        return value

    return Check(accept, choices=among)


def whole(low: int, high: int | None = None) -> Check:
    """Accept a whole number from `low` to `high`, None for no upper limit."""
    span = f"of at least {low}" if high is None else f"from {low} to {high}"

    def accept(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low \
                or (high is not None and value > high):
            raise ValueError(f"{name}: got {value!r}, expected a whole number {span}")
        return int(value)

    return Check(accept, int, "N")


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    """Accept a finite number from `low` to `high`."""
    span = "a finite number" if math.isinf(low) else f"a number of at least {low:g}" if math.isinf(high) \
        else f"a number from {low:g} to {high:g}"

    def accept(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)) \
                or not math.isfinite(value) or not low <= value <= high:
            raise ValueError(f"{name}: got {value!r}, expected {span}")
        return value if isinstance(value, (int, float)) else float(value)

    return Check(accept, float, "X")


def boolean() -> Check:
    """Accept True or False."""
    def accept(name: str, value: object) -> object:
        if not isinstance(value, bool):
            raise ValueError(f"{name}: got {value!r}, expected True or False")
        return value

    return Check(accept, boolean=True)


def pair(low: int, parse: Callable[[str], Any] = picture_size, metavar: str = "HxW") -> Check:
    """Accept two whole numbers of at least `low`, the vertical one first; they are kept as a tuple."""
    def accept(name: str, value: Any) -> tuple[int, int]:
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise ValueError(f"{name}: got {value!r}, expected two whole numbers, the vertical one first")
        for side in value:
            whole(low, 2**16)(name, side)
        return int(value[0]), int(value[1])

    return Check(accept, parse, metavar)


def corner(text: str) -> tuple[int, int]:
    """Return (top, left) of TOP,LEFT, in pixels. Raises ValueError."""
    top, comma, left = text.partition(",")
    if not (comma and top.isdigit() and left.isdigit()):
        raise ValueError(f"got {text!r}, expected TOP,LEFT in pixels such as 0,128")
    return int(top), int(left)


def timesteps() -> Check:
    """Accept whole numbers, each below the one before it; they are kept as a tuple."""
    def accept(name: str, value: Any) -> tuple[int, ...]:
        try:
            steps = tuple(int(t) for t in value)
        except (TypeError, ValueError) as e:
            raise ValueError(f"{name}: got {value!r}, expected whole numbers, highest first") from e
        if not steps or any(a <= b for a, b in pairwise(steps)):
            raise ValueError(f"{name}: got {steps}, expected whole numbers, each below the one before it")
        return steps

    return Check(accept, lambda text: accept("timesteps", text.split(",")), "T,T,...")


def embeddings() -> Check:
    """Accept a list of FILE or NAME=FILE, strings or paths; they are kept as a tuple of strings."""
    def accept(name: str, value: Any) -> tuple[str, ...]:
        if isinstance(value, (str, Path)) or not all(isinstance(file, (str, Path)) for file in value):
            raise ValueError(f"{name}: got {value!r}, expected a list of FILE or NAME=FILE")
        return tuple(str(file) for file in value)

    return Check(accept, metavar="[NAME=]FILE")


def picture() -> Check:
    """Accept the path of a picture, a PIL image or an array."""
    return Check(_picture, metavar="FILE")


def _picture(name: str, value: Any) -> Any:
    if not isinstance(value, (str, Path, Image.Image, np.ndarray)):
        raise ValueError(f"{name}: got {type(value).__name__}, expected the path of a picture, a PIL image or an array")
    return value


def video() -> Check:
    """Accept a picture, or a list of them."""
    def accept(name: str, value: Any) -> Any:
        for frame in value if isinstance(value, (list, tuple)) else [value]:
            _picture(name, frame)
        return value

    return Check(accept, metavar="FILE")


def array() -> Check:
    """Accept numbers; they are kept as float32."""
    return Check(lambda name, value: np.asarray(value, np.float32), metavar="FILE.npy")


def function(of: str) -> Check:
    """Accept what can be called; of: what it is called with, in words."""
    def accept(name: str, value: object) -> object:
        if not callable(value):
            raise ValueError(f"{name}: got {value!r}, expected a function of {of}")
        return value

    return Check(accept)


def latents(name: str, value: Any, count: int) -> np.ndarray:
    """Return latents [C, h, w], or as many as `count`, as float32 [count, C, h, w]. Raises ValueError."""
    array = np.asarray(value, np.float32)
    if array.ndim == 3:
        array = np.broadcast_to(array, (count, *array.shape))
    if array.ndim != 4 or array.shape[0] != count:
        raise ValueError(f"{name}: got shape {tuple(np.shape(value))}, expected [channels, height, width] in latents, "
                         f"or that for each of the {count} images")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: got NaN or infinite values, expected finite numbers of about unit variance")
    return array
