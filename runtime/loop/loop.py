"""The denoising loop: it can be stepped, and images enter and leave it at any step.

    loop = Loop(engines, count)
    loop.submit(job)                      # at any time, from any thread
    while loop.busy:
        for job in loop.step():           # admit · prepare · launch · collect
            …                             # a job that has ended
"""

from __future__ import annotations

from collections import deque

from runtime.loop.job import Job
from runtime.loop.lane import Engines, Lane


class Loop:
    """Lanes of `count` slots, one for every size and length of text that runs; each takes one evaluation a step.

    All that run at one time have the same weights: to change the weights of an engine takes longer than a step. Jobs
    are admitted in the order in which they came; those of other weights, and all that came after them, wait until the
    lanes are empty.

    `submit` may be called from any thread. `step` is for one thread at a time.
    """

    def __init__(self, engines: Engines, count: int) -> None:
        self._engines, self._count = engines, count
        self._arrived: deque[Job] = deque()  # whose append and popleft are atomic
        self._waiting: list[Job] = []
        self._lanes: dict[tuple[object, ...], Lane] = {}
        self._weights: tuple[object, ...] = ()
        self._ended: list[Job] = []

    def submit(self, job: Job) -> None:
        """Let a job join at the next step that has a slot for it."""
        self._arrived.append(job)

    @property
    def busy(self) -> bool:
        """Return whether a job waits, runs, or has not been given back."""
        return bool(self._arrived or self._waiting or self._ended or any(lane.active for lane in self._lanes.values()))

    def step(self) -> list[Job]:
        """Take one step: one evaluation of every job in a slot. Returns the jobs that have ended, with their latents.

        What an engine or a callback raises is raised here, once: the jobs of all lanes that run are given up and come
        back from the next step, with the error in them; those that wait go on.
        """
        self._admit()
        running = [lane for lane in self._lanes.values() if lane.active]
        try:
            for lane in running:
                lane.prepare()
            for job in [job for lane in running for job in lane.launch()]:
                if job.after_step:
                    job.after_step(job)
        except BaseException as e:
            self._ended += [job for lane in running for job in lane.drop(e)]
            raise
        return self._collect()

    def _admit(self) -> None:
        while self._arrived:
            self._waiting.append(self._arrived.popleft())
        self._ended += [job for job in self._waiting if job.done]
        self._waiting = [job for job in self._waiting if not job.done]
        for lane in self._lanes.values():
            lane.release()
        if self._waiting and not any(lane.active for lane in self._lanes.values()):
            self._weights = self._waiting[0].place.weights
        fits: dict[tuple[object, ...], list[Job]] = {}
        for job in self._waiting:
            if job.place.weights != self._weights:
                break
            fits.setdefault(job.place.lane, []).append(job)
        entered: set[int] = set()
        for key, jobs in fits.items():
            if key not in self._lanes:
                self._lanes[key] = Lane(self._engines, self._count)
            entered |= {id(job) for job in self._lanes[key].admit(jobs)}
        self._waiting = [job for job in self._waiting if id(job) not in entered]

    def _collect(self) -> list[Job]:
        ended, self._ended = self._ended, []
        ended += [job for lane in self._lanes.values() for job in lane.collect()]
        if not self.busy:
            for lane in self._lanes.values():
                lane.rest()
        for job in ended:
            job.ended = True
        return ended
