"""The denoising loop: a static batch of slots that images enter and leave at any step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from runtime.devices.bound import BoundEngine
from runtime.loop.frames import Memory
from runtime.loop.noise import Generator
from runtime.loop.slots import Slots
from runtime.request.control import Conditions
from runtime.request.request import Request
from runtime.schedulers import Table


@dataclass(eq=False)
class Job:
    """One image on its way through the sampler.

    fixed: what the UNet reads besides that stays, by input name, [2, …], negative prompt first. time: what it reads of
    the timestep, float32 [rows of `table`, …]. state: float32 [1 + memory, C, h, w], the sample first. known: what is
    blended in after every step, float32 [3, C, h, w]: clean latents, their noise, and the share that is kept. renewed:
    its noise is drawn anew for every step, and it is left out after the last. control: by name, what its ControlNets
    read. memory: of a frame of a video, shared by all of them; after: the frame before it. row: next row of `table`.
    cancelled: set when the user's callback asked for it.
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
    row: int = 0
    cancelled: bool = field(default=False)

    @property
    def latents(self) -> np.ndarray:
        return self.state[0]

    @property
    def nets(self) -> set[str]:
        """The ControlNets that are used in the next evaluation."""
        return {name for name, given in self.control.items() if given.time["scale"][self.row]}

    @property
    def ready(self) -> bool:
        """Whether the frame before is a step ahead."""
        return self.after is None or self.after.row > 0

    @property
    def done(self) -> bool:
        return self.cancelled or self.row == self.table.rows


def denoise(unet: Callable[[int, str], BoundEngine], slots: Slots, jobs: Iterable[Job],
            after_step: Callable[[Job], None], net: Callable[[str, int], BoundEngine] | None = None) -> None:
    """Run every job to its end; `after_step(job)` follows every evaluation and may cancel jobs.

    `unet(rows, variant)` gives the bound UNet of that many rows: twice the slots while a guided job is running, with
    the negative prompts in the first half, or as many as the slots otherwise. variant: "frames" with a video among the
    jobs, else "control" where a ControlNet is used, else "". `net(name, rows)` is the ControlNet of that name.
    """
    waiting = deque(jobs)
    running: list[Job | None] = [None] * slots.count
    slots.clear()
    while True:
        for i, job in enumerate(running):
            if job is not None and job.done:
                slots.leave(i, job)
                running[i] = None
            if running[i] is None and (new := _next(waiting)):
                slots.enter(i, new)
                running[i] = new
        active = [(i, job) for i, job in enumerate(running) if job is not None]
        if not active:
            break
        guided = any(job.request.guided for _, job in active)
        rows = slots.count * (2 if guided else 1)
        names = sorted(set[str]().union(*(job.nets for _, job in active)))
        video = any(job.memory for _, job in active)
        variant = "frames" if video else "control" if names else ""
        slots.step(unet(rows, variant), active, {name: net(name, rows) for name in names} if net else {})
        for _, job in active:
            after_step(job)
    slots.collect()


def _next(waiting: deque[Job]) -> Job | None:
    """The next job that is ready and that nobody has cancelled meanwhile."""
    for job in list(waiting):
        if job.done or job.ready:
            waiting.remove(job)
        if job.ready and not job.done:
            return job
    return None
