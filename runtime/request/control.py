"""ControlNets (Zhang et al., 2023, arXiv 2302.05543): what a request asks of one, and what the net is given for it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from runtime.pictures.hints import PREPROCESSORS
from runtime.request import checks


@dataclass(frozen=True)
class Control:
    """One ControlNet of a request.

    name: that it was attached under. image: its hint, a file, PIL image or array as of `Request.image`, RGB; resized to
    the picture's size; for a video also one of its own, as of `Request.frames`. preprocessor: "canny" where the hint is
    the edges of `image` (`runtime.pictures.hints`), None where it is `image` itself. scale: what its residuals are multiplied
    by. start, end: the share of the steps that it is used in: from which on, and until which. Raises ValueError for a
    value that cannot be.
    """

    name: str
    image: Any = field(compare=False, repr=False)
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    preprocessor: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w-]+", self.name):
            raise ValueError(f"control: got the name {self.name!r}, expected that of an attached ControlNet")
        if self.image is None:
            raise ValueError(f"control: got no image for {self.name}, expected its hint; pass one")
        checks.video("control", self.image)
        if self.preprocessor is not None:
            checks.choice("control preprocessor", self.preprocessor, tuple(PREPROCESSORS))
        checks.number("control scale", self.scale, -1000.0, 1000.0)
        checks.number("control start", self.start, 0.0, 1.0)
        checks.number("control end", self.end, 0.0, 1.0)
        if self.start >= self.end:
            raise ValueError(f"control: got start {self.start:g} and end {self.end:g}, expected start < end")

    @classmethod
    def parse(cls, text: str) -> Self:
        """"NAME=FILE", "NAME=FILE:SCALE" or either with ",KEY=VALUE" after it, as the command line has it.

        Keys: start, end, preprocessor. Raises ValueError.
        """
        first, *rest = text.split(",")
        name, equals, file = first.partition("=")
        path, colon, scale = file.rpartition(":")
        given: dict[str, Any] = dict(word.partition("=")[::2] for word in rest)
        try:
            if colon:
                given["scale"], file = float(scale), path
            given |= {key: float(given[key]) for key in ("start", "end") if key in given}
            if not (name and equals and file) or set(given) - {"scale", "start", "end", "preprocessor"}:
                raise ValueError
        except ValueError:
            raise ValueError(f"control: got {text!r}, expected NAME=FILE or NAME=FILE:SCALE with a number, and any of "
                             ",start=… ,end=… ,preprocessor=… after it") from None
        return cls(name, file, **given)

    def scales(self, steps: int) -> np.ndarray:
        """float32 [steps], what the residuals are multiplied by at every one: 0 where it is not used.

        Step i of n is used where start <= i / n and (i + 1) / n <= end, the rule of diffusers' pipelines.
        """
        used = [i / steps >= self.start and (i + 1) / steps <= self.end for i in range(steps)]
        return np.float32(self.scale) * np.array(used, np.float32)

    def to_json(self) -> dict[str, Any]:
        """Its fields; of an image given by hand, true."""
        image = str(self.image) if isinstance(self.image, (str, Path)) else True
        return {**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, "image": image}


@dataclass(frozen=True)
class Conditions:
    """What a ControlNet reads for one request, by input name, beside the sample.

    fixed: what stays, [2, …], negative prompt first. time: what depends on the step, float32 [rows of the table, …];
    "scale" is one of them.
    """

    fixed: Mapping[str, np.ndarray]
    time: Mapping[str, np.ndarray]


def read_controls(value: Any) -> tuple[Control, ...]:
    """`Request.control` as a tuple, from one Control, several, or what `Control.to_json` gave. Raises ValueError."""
    given = (value,) if isinstance(value, Control) else value
    if not isinstance(given, (list, tuple)):
        raise ValueError(f"control: got {type(value).__name__}, expected a Control or a list of them")
    controls = tuple(Control(**one) if isinstance(one, Mapping) else one for one in given)
    for control in controls:
        if not isinstance(control, Control):
            raise ValueError(f"control: got a {type(control).__name__} in the list, expected a Control")
    names = [control.name for control in controls]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"control: got {twice[0]} twice, expected each ControlNet once; attach it under another name "
                         "to use it with two hints")
    return controls
