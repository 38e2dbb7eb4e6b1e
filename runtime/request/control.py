"""ControlNets (Zhang et al., 2023, arXiv 2302.05543) that a request asks for, and the inputs that they are given."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Self

import numpy as np

from runtime.pictures.hints import PREPROCESSORS
from runtime.request.checks import Check, choice, number, video
from runtime.request.option import check_options, option, options_of, origin, stored


def _name(name: str, value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch(r"[\w-]+", value):
        raise ValueError(f"control: got the name {value!r}, expected that of an attached ControlNet")
    return value


def _hint(name: str, value: Any) -> Any:
    return video()("control", value)


@dataclass(frozen=True)
class Control:
    """A control is one ControlNet of a request. Raises ValueError for a value that cannot be."""

    name: str = option(MISSING, Check(_name, metavar="NAME"), "that it was attached under")
    image: Any = option(MISSING, Check(_hint, metavar="FILE"), "its hint, a picture, RGB, resized to the size that is "
                        "drawn; for a video also one of its own", compare=False, repr=False, store=origin)
    scale: float = option(1.0, number(-1000.0, 1000.0), "what its residuals are multiplied by")
    start: float = option(0.0, number(0.0, 1.0), "share of the steps from which on it is used")
    end: float = option(1.0, number(0.0, 1.0), "share of the steps until which it is used")
    preprocessor: str | None = option(None, choice(*PREPROCESSORS), "makes the hint of `image`, as canny makes its "
                                      "edges (`runtime.pictures.hints`)", unset="`image` is the hint itself")

    def __post_init__(self) -> None:
        if self.image is None:
            _name("name", self.name)
            raise ValueError(f"control: got no image for {self.name}, expected its hint; pass one")
        check_options(self, "control ")
        if self.start >= self.end:
            raise ValueError(f"control: got start {self.start:g} and end {self.end:g}, expected start < end")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what "NAME=FILE", "NAME=FILE:SCALE" or either with ",KEY=VALUE" after it means on the command line.

        Keys: scale, start, end, preprocessor. Raises ValueError.
        """
        first, *rest = text.split(",")
        name, equals, file = first.partition("=")
        path, colon, scale = file.rpartition(":")
        words = dict(word.partition("=")[::2] for word in rest)
        if colon:
            words, file = {"scale": scale, **words}, path
        keys = {key: declared for key, declared in options_of(cls).items() if key not in ("name", "image")}
        try:
            if not (name and equals and file):
                raise ValueError
            values = {key: keys[key].check.parse(word) for key, word in words.items()}
        except (ValueError, KeyError):
            raise ValueError(f"control: got {text!r}, expected NAME=FILE or NAME=FILE:SCALE with a number, and any of "
                             ",start=… ,end=… ,preprocessor=… after it") from None
        return cls(name, file, **values)

    def scales(self, steps: int) -> np.ndarray:
        """Return what the residuals are multiplied by at every step, float32 [steps]: 0 where the net is not used.

        Step i of n is used where start <= i / n and (i + 1) / n <= end, the rule of diffusers' pipelines.
        """
        used = [i / steps >= self.start and (i + 1) / steps <= self.end for i in range(steps)]
        return np.float32(self.scale) * np.array(used, np.float32)

    def to_json(self) -> dict[str, Any]:
        """Return every option; true for an image given by hand."""
        return stored(self, defaults=True)


@dataclass(frozen=True)
class Conditions:
    """The inputs of a ControlNet for one request, by name, beside the sample.

    fixed: inputs that stay for all steps, [2, …], negative prompt first. time: inputs that depend on the step, float32
    [rows of the table, …]; "scale" is one of them.
    """

    fixed: Mapping[str, np.ndarray]
    time: Mapping[str, np.ndarray]


def _controls(name: str, value: Any) -> tuple[Control, ...]:
    listed = (value,) if isinstance(value, Control) else value
    if not isinstance(listed, (list, tuple)):
        raise ValueError(f"{name}: got {type(value).__name__}, expected a Control or a list of them")
    controls = tuple(Control(**member) if isinstance(member, Mapping) else member for member in listed)
    for control in controls:
        if not isinstance(control, Control):
            raise ValueError(f"{name}: got a {type(control).__name__} in the list, expected a Control")
    names = [control.name for control in controls]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"{name}: got {twice[0]} twice, expected each ControlNet once; attach it under another name "
                         "to use it with two hints")
    return controls


CONTROLS = Check(_controls, Control.parse, "NAME=FILE[:SCALE][,KEY=VALUE]")
"""A Control, several, or what `Control.to_json` gave; kept as a tuple of Controls."""
