"""A job is one image on its way through the sampler, as the loop sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from runtime.loop.frames import Memory
from runtime.loop.noise import Generator
from runtime.request.control import Conditions
from runtime.request.request import Request
from runtime.schedulers import Table


class Place(NamedTuple):
    """A place is what a job needs of the engines that run it. size: (height, width) in pixels. tokens: of its text.

    Jobs of one size and length of text share a batch. weights: what changes the engines' weights, LoRAs; jobs of other
    weights never run at the same time.
    """

    size: tuple[int, int] = (0, 0)
    tokens: int = 0
    weights: tuple[object, ...] = ()

    @property
    def lane(self) -> tuple[tuple[int, int], int]:
        """The lane that the job runs in: one static batch."""
        return self.size, self.tokens


@dataclass(eq=False)
class Job:
    """A job is one image on its way through the sampler.

    fixed: what the denoiser reads besides that stays, by input name, [2, …], negative prompt first. time: what it reads
    of the timestep, float32 [rows of `table`, …]. state: float32 [1 + memory, C, h, w], the sample first. known: what
    is blended in after every step, float32 [3, C, h, w]: clean latents, their noise, and the share that is kept.
    renewed: its noise is drawn anew for every step, and it is left out after the last. control: by name, what its
    ControlNets read. memory: of a frame of a video, shared by all of them; after: the frame before it. place: what it
    needs of the engines. after_step: called after every evaluation, by whoever steps the loop. row: next row of
    `table`. cancelled: set by whoever no longer wants it; it leaves before the next evaluation. error: what ended it
    too early. ended: the loop has given it back.
    """

    request: Request
    request_index: int
    image: int
    fixed: Mapping[str, np.ndarray]
    time: Mapping[str, np.ndarray]
    table: Table
    noise: Generator
    state: np.ndarray
    known: np.ndarray | None = None
    renewed: bool = False
    control: Mapping[str, Conditions] = field(default_factory=dict)
    memory: Memory | None = None
    after: Job | None = None
    place: Place = field(default_factory=Place)
    after_step: Callable[[Job], None] | None = None
    row: int = 0
    cancelled: bool = False
    error: BaseException | None = None
    ended: bool = False

    @property
    def latents(self) -> np.ndarray:
        """The sample, float32 [C, h, w]: where it began, until the loop gives the job back."""
        return self.state[0]

    @property
    def nets(self) -> set[str]:
        """The ControlNets that are used in the next evaluation."""
        return {name for name, given in self.control.items() if given.time["scale"][self.row]}

    @property
    def watched(self) -> bool:
        """Return whether somebody wants its latents after every evaluation."""
        return self.request.on_step is not None

    @property
    def ready(self) -> bool:
        """Return whether the frame before is a step ahead."""
        return self.after is None or self.after.row > 0 or self.after.done

    @property
    def done(self) -> bool:
        """Return whether no evaluation is left."""
        return self.cancelled or self.error is not None or self.row == self.table.rows
