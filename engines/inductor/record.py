"""A build writes this beside the package: how its inputs and weights are laid out, and whose kernels it holds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from engines.spec import EngineError

PACKAGE, RECORD, CONSTANTS = "package.pt2", "inductor.json", "constants.npz"
"""Files of an engine: the compiled code; a Record; arrays that the code reads, which no refit changes."""


@dataclass(frozen=True)
class Record:
    """A record says in JSON values what an engine is.

    inputs, outputs: names, in the package's order. weights: name of a constant of the package → the fields of
    `engines.inductor.torch.weights.Weight`. cpp: whether the package calls our C++ kernels. kernels: kind of site →
    {asked, used}. sites: kind → {ours, vendor or fp8}, how many. timings: {kind, shapes, arguments, sites, used,
    seconds, rounds} of every site where both kernels were timed, seconds and rounds by whose. failed: site → why ours
    is not used.
    """

    inputs: Sequence[str]
    outputs: Sequence[str]
    weights: Mapping[str, Mapping[str, Any]]
    cpp: bool
    kernels: Mapping[str, Mapping[str, str]]
    sites: Mapping[str, Mapping[str, int]]
    timings: Sequence[Mapping[str, Any]]
    failed: Mapping[str, str]

    def write(self, directory: Path) -> None:
        """Write it into the directory of an engine."""
        (directory / RECORD).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf8")

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read that of the engine in `directory`. Raises EngineError where it is damaged."""
        file = directory / RECORD
        try:
            return cls(**json.loads(file.read_text(encoding="utf8")))
        except (OSError, ValueError, TypeError) as e:
            raise EngineError(f"{file} cannot be read ({e}); build the engine again: python -m engines build BUNDLE "
                              "--backend inductor --rebuild") from e
