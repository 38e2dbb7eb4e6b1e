"""The slots of a static batch, where the engines run: everything that a step reads or writes, at fixed addresses.

A step is three things enqueued one after another: `step_input` writes what the UNet reads, the UNet runs, and
`guidance_step` takes every image through the next row of its table and counts it on. The host only enqueues; it looks
at nothing that a step computes unless a request has a callback.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.step_table import fitting_memory, pack, pack_times, time_columns, width
from runtime.buffers import BoundEngine
from runtime.device import Device, signature

if TYPE_CHECKING:
    from runtime.denoise import Job

AHEAD = 4
"""Steps that the host may be ahead of the device: enough to keep it busy, few enough to see progress and to stop."""

ROWS = 32
"""Tables are kept for a multiple of this many rows, so that another number of steps seldom needs other buffers."""


@dataclass(frozen=True)
class Capacity:
    """What a batch of jobs needs of its slots. memory: arrays of solver memory. rows: of the longest table, rounded up.

    latent: (C, h, w). times: inputs that depend on the timestep → numbers in one row.
    """

    memory: int
    rows: int
    latent: tuple[int, ...]
    times: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, jobs: Sequence[Job]) -> Capacity:
        """The least that holds `jobs`, all of one size."""
        rows = max(job.table.rows for job in jobs)
        times = tuple((name, math.prod(values.shape[1:])) for name, values in jobs[0].time.items())
        return cls(fitting_memory(max(job.table.slots for job in jobs)), -(-rows // ROWS) * ROWS,
                   jobs[0].latents.shape, times)


@dataclass
class _Step:
    """A step with the UNet of one batch size. held: whose fixed inputs that UNet has, by slot."""

    key: Hashable
    enqueue: Callable[[Any], None]
    held: list[Job | None]


class Slots:
    """`count` slots of a device."""

    def __init__(self, device: Device, count: int, capacity: Capacity) -> None:
        def zeros(*shape: int, dtype: Any = np.float32) -> Any:
            return device.zeros((count, *shape), dtype)

        memory, rows, latent = capacity.memory, capacity.rows, capacity.latent
        self.device = device
        self.count = count
        self.capacity = capacity
        self._arrays = {
            "state": zeros(1 + memory, *latent), "table": zeros(rows, width(memory)), "controls": zeros(3),
            "known": zeros(3, *latent), "noise": zeros(1, *latent), "progress": zeros(3, dtype=np.int32)}
        self._times = zeros(rows, sum(numbers for _, numbers in capacity.times))
        self._timestep = device.zeros((2 * count,), np.float32)  # guidance_step writes it; step_input has its own
        self._key = signature({**self._arrays, "times": self._times, "timestep": self._timestep})
        self._steps: dict[BoundEngine, _Step] = {}
        self._marks: deque[Callable[[], None]] = deque()
        self._leaving: list[tuple[Job, Callable[[], np.ndarray]]] = []

    def clear(self) -> None:
        """Empty every slot, whatever an earlier run has left in them."""
        self.device.use()
        self.collect()
        self._marks.clear()
        self.device.upload(self._arrays["progress"], np.zeros((self.count, 3), np.int32))
        for step in self._steps.values():
            step.held = [None] * self.count

    def enter(self, i: int, job: Job) -> None:
        """Put a job into slot `i`."""
        memory, request = self.capacity.memory, job.request
        state = np.zeros((1 + memory, *self.capacity.latent), np.float32)
        state[:len(job.state)] = job.state
        guidance = request.guidance if request.guided else 1.0
        self._put("state", i, state)
        blend = float(job.known is not None)
        self._put("controls", i, np.array([guidance, request.guidance_rescale, blend], np.float32))
        if job.known is not None:
            self._put("known", i, job.known)
        self._put("progress", i, np.array([job.row, job.table.rows, 0], np.int32))
        self.device.upload(self._arrays["table"][i][:job.table.rows], pack(job.table, memory))
        self.device.upload(self._times[i][:job.table.rows], pack_times(job.time))

    def leave(self, i: int, job: Job) -> None:
        """Empty slot `i`; `collect` gives the job its latents."""
        self._leaving.append((job, self.device.download(self._arrays["state"][i][0])))
        self._put("progress", i, np.zeros(3, np.int32))

    def collect(self) -> None:
        """Wait for the latents of every job that has left."""
        for job, wait in self._leaving:
            job.latents[...] = wait()
        self._leaving.clear()

    def step(self, unet: BoundEngine, active: Sequence[tuple[int, Job]]) -> None:
        """Enqueue one evaluation of every active job, whose `row` is then the next; those with a callback are waited
        for and have their latents.

        unet: of `count` rows, or of twice as many with the negative prompts first.
        """
        step = self._steps[unet] = self._steps.get(unet) or self._bind(unet)
        for i, job in active:
            if step.held[i] is not job:
                self._put_fixed(unet, i, job.fixed)
                step.held[i] = job
            if job.table.draws[job.row]:
                self._put("noise", i, job.noise.randn(self.capacity.latent)[None])
            if job.renewed:
                self._renew(i, job)
        self.device.run(step.key, step.enqueue)
        self._marks.append(self.device.mark())
        if len(self._marks) > AHEAD:
            self._marks.popleft()()
        for _, job in active:
            job.row += 1
        watched = [(job, self.device.download(self._arrays["state"][i][0])) for i, job in active
                   if job.request.on_step is not None]
        for job, wait in watched:
            job.latents[...] = wait()

    def _bind(self, unet: BoundEngine) -> _Step:
        rows = unet.buffers["sample"].shape[0]
        widths = dict(self.capacity.times)
        columns = self.device.zeros((len(widths), 3), np.int32)
        self.device.upload(columns, time_columns(widths, unet.offsets))
        read = {name: self._arrays[name] for name in ("state", "table", "progress")}
        sample = unet.buffers["sample"]
        assemble = self.device.kernel("step_input", **read, times=self._times, columns=columns, sample=sample,
                                      arena=unet.arena)
        update = self.device.kernel("guidance_step", **self._arrays, noise_pred=unet.buffers["noise_pred"],
                                    sample=sample, timestep=self._timestep[:rows])

        def enqueue(stream: Any) -> None:
            assemble(stream)
            unet.enqueue(stream)
            update(stream)

        return _Step((self._key, unet.key, signature({"columns": columns})), enqueue, [None] * self.count)

    def _put(self, name: str, i: int, values: np.ndarray) -> None:
        self.device.upload(self._arrays[name][i], values)

    def _put_fixed(self, unet: BoundEngine, i: int, fixed: Mapping[str, np.ndarray]) -> None:
        first = unet.buffers["sample"].shape[0] - self.count
        for name, values in fixed.items():  # without guidance both are the same row, the positive one last
            for row, value in ((i, values[:1]), (first + i, values[1:])):
                self.device.upload(unet.buffers[name][row:row + 1], value)

    def _renew(self, i: int, job: Job) -> None:
        """Other noise for what is blended in before the next step; nothing is, after the last."""
        if job.row + 1 < job.table.rows:
            self.device.upload(self._arrays["known"][i][1], job.noise.randn(self.capacity.latent))
        else:
            self.device.upload(self._arrays["controls"][i][2:], np.zeros(1, np.float32))
