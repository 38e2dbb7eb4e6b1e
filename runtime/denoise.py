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
from runtime.step import advance, guide


@dataclass(eq=False)
class Job:
    """One image on its way through the sampler.

    text: what the UNet reads besides that stays, by input name, float32 [2, …], negative prompt first. time: what it
    reads of the timestep, float32 [rows of `table`, …]. state: float32 [1 + memory, C, h, w], the sample first. row:
    next row of `table`. cancelled: set when the user's callback asked for it.
    """

    request: Request
    request_index: int
    image: int
    text: Mapping[str, np.ndarray]
    time: Mapping[str, np.ndarray]
    table: Table
    noise: Generator
    state: np.ndarray
    row: int = 0
    cancelled: bool = field(default=False)

    @property
    def latents(self) -> np.ndarray:
        return self.state[0]

    @property
    def done(self) -> bool:
        return self.cancelled or self.row == self.table.rows


def denoise(unet: Callable[[int], BoundEngine], slots: int, jobs: Iterable[Job],
            after_step: Callable[[Job], None]) -> None:
    """Run every job to its end on `slots` slots; `after_step(job)` follows every evaluation and may cancel jobs.

    `unet(rows)` gives the bound UNet of that many rows: twice the slots while a guided job is running, with the
    negative prompts in the first half, or as many as the slots otherwise.
    """
    waiting = deque(jobs)
    running: list[Job | None] = [None] * slots
    texts: dict[int, list[Job | None]] = {}  # rows → whose text the UNet of that many rows holds, by slot
    while waiting or any(running):
        for i, job in enumerate(running):
            if job is None or job.done:
                running[i] = _next(waiting)
        active = [(i, job) for i, job in enumerate(running) if job is not None]
        if not active:
            return
        first = slots if any(job.request.guided for _, job in active) else 0  # row of slot 0's prompt
        engine = unet(first + slots)
        _assemble(engine, first, active, texts.setdefault(first, [None] * slots))
        engine.engine.enqueue()
        for i, job in active:
            _advance(job, engine.buffers["noise_pred"], i, first + i)
            after_step(job)


def _next(waiting: deque[Job]) -> Job | None:
    """The next job that nobody has cancelled meanwhile."""
    while waiting:
        job = waiting.popleft()
        if not job.done:
            return job
    return None


def _assemble(engine: BoundEngine, first: int, active: list[tuple[int, Job]], held: list[Job | None]) -> None:
    """Write sample and time of every active slot into both of its rows, and its text where it is new."""
    sample = engine.buffers["sample"]
    for i, job in active:
        np.multiply(job.latents, np.float32(job.table.input_scale[job.row]), out=sample[first + i])
        sample[i] = sample[first + i]
        for name, values in job.time.items():
            engine.buffers[name][[i, first + i]] = values[job.row]
        if held[i] is not job:
            for name, values in job.text.items():
                engine.buffers[name][i] = values[0]
                engine.buffers[name][first + i] = values[1]  # without guidance this is the same row
            held[i] = job


def _advance(job: Job, noise_pred: np.ndarray, uncond: int, cond: int) -> None:
    """Guidance and one solver row for one job, from its two rows of the UNet's output."""
    prediction = noise_pred[cond]
    if job.request.guided:
        prediction = guide(noise_pred[uncond], prediction, job.request.guidance, job.request.guidance_rescale)
    draw = job.noise.randn(job.latents.shape) if job.table.draws[job.row] else None
    advance(job.state, prediction, draw, job.table, job.row)
    job.row += 1
