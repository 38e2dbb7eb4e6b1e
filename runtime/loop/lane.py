"""A lane is a static batch of the loop: the jobs of one size and length of text, and their slots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from runtime.devices.bound import BoundEngine
from runtime.loop.job import Job, Place
from runtime.loop.slots import Capacity, Slots


class Engines(Protocol):
    """Engines run the steps of a loop: bound for a place, made and given their weights when asked for."""

    def denoiser(self, place: Place, rows: int, variant: str) -> BoundEngine:
        """Return the denoiser of so many rows. variant: "frames" for one that attends to other frames of a video,
        "control" for one that adds residuals of ControlNets, else ""."""
        ...

    def net(self, name: str, place: Place, rows: int) -> BoundEngine:
        """Return the ControlNet of that name."""
        ...


class Lane:
    """`count` slots that jobs of one size and length of text enter and leave at any step.

    Slots are kept by what they hold, so that their addresses, and graphs with them, stay from one run to the next.
    """

    def __init__(self, engines: Engines, count: int) -> None:
        self._engines, self._count = engines, count
        self._kept: dict[tuple[object, ...], Slots] = {}
        self._slots: Slots | None = None
        self._running: list[Job | None] = [None] * count
        self._step: tuple[BoundEngine, dict[str, BoundEngine]] | None = None
        self._ended: list[Job] = []

    @property
    def active(self) -> list[tuple[int, Job]]:
        """The jobs that are in a slot, with its number."""
        return [(i, job) for i, job in enumerate(self._running) if job is not None]

    def admit(self, waiting: Sequence[Job]) -> list[Job]:
        """Put jobs that wait into the free slots, in their order; returns which."""
        entering = list(self._next(waiting))
        if not entering:
            return []
        if not self.active:
            self._open([job for job in waiting if not job.done])
        else:
            self._grow([*(job for _, job in self.active), *entering])
        assert self._slots
        for job in entering:
            i = self._running.index(None)
            self._slots.enter(i, job)
            self._running[i] = job
        return entering

    def release(self) -> None:
        """Empty the slots of jobs that are done."""
        for i, job in self.active:
            if job.done and self._slots:
                self._slots.leave(i, job)
                self._running[i] = None

    def prepare(self) -> None:
        """Choose the engines of the next evaluation, and enqueue the copies of what they read."""
        active = self.active
        guided = any(job.request.guided for _, job in active)
        names = sorted(set[str]().union(*(job.nets for _, job in active)))
        variant = "frames" if any(job.memory for _, job in active) else "control" if names else ""
        rows, place = self._count * (2 if guided else 1), active[0][1].place
        denoiser = self._engines.denoiser(place, rows, variant)
        self._step = denoiser, {name: self._engines.net(name, place, rows) for name in names}
        assert self._slots
        self._slots.prepare(*self._step, active)

    def launch(self) -> list[Job]:
        """Enqueue what `prepare` has prepared; returns the jobs that have taken a step."""
        assert self._slots and self._step
        active = self.active
        self._slots.launch(*self._step, active)
        return [job for _, job in active]

    def collect(self) -> list[Job]:
        """Return the jobs that have ended, with their latents: all once none is left, else those that are there."""
        self.release()
        ended, self._ended = self._ended, []
        return ended + (self._slots.collect(wait=not self.active) if self._slots else [])

    def rest(self) -> None:
        """Forget the slots in use: the loop has nothing more to do, and what comes next chooses its own."""
        self._slots = None

    def drop(self, error: BaseException) -> list[Job]:
        """Give up the jobs in the slots after an error in the middle of a step; returns them."""
        dropped = [job for _, job in self.active]
        for job in dropped:
            job.error = error
        self._running = [None] * self._count
        self._slots = None
        return dropped

    def _next(self, waiting: Sequence[Job]) -> Iterator[Job]:
        """Yield the jobs that enter now: a frame of a video does once the frame before it is a step ahead."""
        free = self._running.count(None)
        for job in waiting:
            if free and job.ready and not job.done:
                free -= 1
                yield job

    def _open(self, jobs: Sequence[Job]) -> None:
        """Take slots that hold all that wait while none is running; those of before, where they do, unless rested."""
        needed = Capacity.of(jobs)
        if self._slots and self._slots.capacity.holds(needed):
            return
        key = (needed.memory, needed.times, needed.nets)
        if key not in self._kept or not self._kept[key].capacity.holds(needed):
            self._kept[key] = self._make(needed, jobs)
        self._slots = self._kept[key]
        self._slots.clear()

    def _grow(self, jobs: Sequence[Job]) -> None:
        """Move the running jobs into larger slots where `jobs`, they and those that enter, need them."""
        assert self._slots
        if self._slots.capacity.holds(needed := Capacity.of(jobs)):
            return
        old, capacity = self._slots, self._slots.capacity.union(needed)
        self._ended += old.collect(wait=True)
        self._slots = self._kept[capacity.memory, capacity.times, capacity.nets] = self._make(capacity, jobs)
        for i, job in self.active:
            old.move(i, job, self._slots)

    def _make(self, capacity: Capacity, jobs: Sequence[Job]) -> Slots:
        rows = self._count * (2 if any(job.request.guided for job in jobs) else 1)
        return Slots(self._engines.denoiser(jobs[0].place, rows, "").device, self._count, capacity)
