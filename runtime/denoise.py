"""The denoising loop: a static batch of slots that images enter and leave at any step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from runtime.buffers import BoundEngine
from runtime.noise import Generator
from runtime.request import Request
from runtime.schedulers import Table
from runtime.slots import Slots


@dataclass(eq=False)
class Job:
    """One image on its way through the sampler.

    fixed: what the UNet reads besides that stays, by input name, [2, …], negative prompt first. time: what it reads of
    the timestep, float32 [rows of `table`, …]. state: float32 [1 + memory, C, h, w], the sample first. known: what is
    blended in after every step, float32 [3, C, h, w]: clean latents, their noise, and the share that is kept. renewed:
    its noise is drawn anew for every step, and it is left out after the last. row: next row of `table`. cancelled: set
    when the user's callback asked for it.
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
    row: int = 0
    cancelled: bool = field(default=False)

    @property
    def latents(self) -> np.ndarray:
        return self.state[0]

    @property
    def done(self) -> bool:
        return self.cancelled or self.row == self.table.rows


def denoise(unet: Callable[[int], BoundEngine], slots: Slots, jobs: Iterable[Job],
            after_step: Callable[[Job], None]) -> None:
    """Run every job to its end; `after_step(job)` follows every evaluation and may cancel jobs.

    `unet(rows)` gives the bound UNet of that many rows: twice the slots while a guided job is running, with the
    negative prompts in the first half, or as many as the slots otherwise.
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
        slots.step(unet(slots.count * (2 if guided else 1)), active)
        for _, job in active:
            after_step(job)
    slots.collect()


def _next(waiting: deque[Job]) -> Job | None:
    """The next job that nobody has cancelled meanwhile."""
    while waiting:
        job = waiting.popleft()
        if not job.done:
            return job
    return None
