"""The slots of a static batch, where the engines run: everything that a step reads or writes, at fixed addresses.

A step is three things enqueued one after another: `step_input` writes what the denoiser reads, the denoiser runs, and
`guidance_step` takes every image through the next row of its table and counts it on. The host only enqueues; it looks
at nothing that a step computes unless somebody watches a job. Each ControlNet that an image uses comes before the
denoiser: `step_input` for it, the net, and `accumulate`, which sums what the nets give in the denoiser's inputs. An
image that does not use it has a scale of 0 there. A frame of a video is given what other frames have left in its
`Memory` (`runtime.loop.frames`) before the denoiser runs, and leaves its own there afterwards.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from engines import EngineError
from kernels.host.step_table import fitting_memory, pack, pack_times, time_columns, width
from runtime.devices.bound import BoundEngine
from runtime.devices.device import Device, signature
from runtime.loop.job import Job

AHEAD = 4
"""Steps that the host may be ahead of the device: enough to keep it busy, few enough to see progress and to stop."""

ROWS = 32
"""Tables are kept for a multiple of this many rows, so that another number of steps seldom needs other buffers."""

RESIDUAL, STORE = "residual", "store"
"""Groups of tensors: what ControlNets give to the denoiser; whether a row attends to itself, as a first frame does."""

DENOISER = ""
"""The denoiser's name where ControlNets have theirs."""


@dataclass(frozen=True)
class Capacity:
    """The size of slots that hold a batch of jobs.

    memory: arrays of solver memory. rows: of the longest table, rounded up. latent: (C, h, w). times: inputs that
    depend on the timestep → numbers in one row. nets: the same of ControlNets.
    """

    memory: int
    rows: int
    latent: tuple[int, ...]
    times: tuple[tuple[str, int], ...]
    nets: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = ()

    @classmethod
    def of(cls, jobs: Sequence[Job]) -> Capacity:
        """Return the least capacity that holds `jobs`, all of one size."""
        rows = max(job.table.rows for job in jobs)
        nets = {name: _numbers(given.time) for job in jobs for name, given in job.control.items()}
        return cls(fitting_memory(max(job.table.slots for job in jobs)), -(-rows // ROWS) * ROWS,
                   jobs[0].latents.shape, _numbers(jobs[0].time), tuple(sorted(nets.items())))

    def union(self, other: Self) -> Self:
        """Return the capacity that holds what either does."""
        return dataclasses.replace(self, memory=max(self.memory, other.memory), rows=max(self.rows, other.rows),
                                   nets=tuple(sorted(dict((*self.nets, *other.nets)).items())))

    def holds(self, other: Self) -> bool:
        """Return whether slots of this capacity hold what needs `other`."""
        return (self.latent, self.times) == (other.latent, other.times) and set(other.nets) <= set(self.nets) \
            and other.memory <= self.memory and other.rows <= self.rows


def _numbers(times: Mapping[str, np.ndarray]) -> tuple[tuple[str, int], ...]:
    return tuple((name, math.prod(values.shape[1:])) for name, values in times.items())


@dataclass
class _Step:
    """A step with the UNet, and ControlNets, of one batch size."""

    key: Hashable
    enqueue: Callable[[Any], None]


class Slots:
    """`count` slots on a device. A step is `prepare`, then `launch`; `collect` gives back the jobs that have left."""

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
        self._times = {name: zeros(rows, sum(numbers for _, numbers in times))
                       for name, times in ((DENOISER, capacity.times), *capacity.nets)}
        self._keep = device.zeros((1,), np.int32), device.zeros((1,), np.int32)
        device.upload(self._keep[1], np.ones(1, np.int32))
        self._timestep = device.zeros((2 * count,), np.float32)  # guidance_step writes it; step_input has its own
        self._key = signature({**self._arrays, "timestep": self._timestep})
        self._steps: dict[tuple[BoundEngine, ...], _Step] = {}
        self._held: dict[BoundEngine, list[Job | None]] = {}  # whose fixed inputs an engine has, by slot
        self._bare: set[BoundEngine] = set()  # denoisers for videos whose residuals are known to be zero
        self._ahead = AHEAD if device.asynchronous else 0
        self._marks: deque[Callable[[], None]] = deque()
        self._launched = 0
        self._leaving: deque[tuple[int, Job, Callable[[], np.ndarray]]] = deque()

    def clear(self) -> None:
        """Empty every slot, whatever an earlier run has left in them."""
        self.device.use()
        self._leaving.clear()
        self._marks.clear()
        self.device.upload(self._arrays["progress"], np.zeros((self.count, 3), np.int32))
        self._held.clear()
        self._bare.clear()

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
        self.device.upload(self._times[DENOISER][i][:job.table.rows], pack_times(job.time))
        for name, times in self.capacity.nets:
            unused = np.zeros((job.table.rows, sum(numbers for _, numbers in times)), np.float32)
            packed = pack_times(job.control[name].time) if name in job.control else unused
            self.device.upload(self._times[name][i][:job.table.rows], packed)

    def leave(self, i: int, job: Job) -> None:
        """Empty slot `i`; `collect` gives the job its latents."""
        self._leaving.append((self._launched, job, self.device.download(self._arrays["state"][i][0])))
        self._put("progress", i, np.zeros(3, np.int32))

    def move(self, i: int, job: Job, other: Slots) -> None:
        """Put the job of slot `i`, with the state that it has reached, into the same slot of `other`."""
        state = self.device.download(self._arrays["state"][i])()
        job.state[...] = state[:len(job.state)]
        other.enter(i, job)

    def collect(self, wait: bool) -> list[Job]:
        """Return the jobs that have left, with their latents.

        wait: all of them; else only those whose latents are there by now, so that the host waits for nothing.
        """
        finished, jobs = self._launched - len(self._marks), []
        while self._leaving and (wait or not self._ahead or self._leaving[0][0] < finished):
            _, job, latents = self._leaving.popleft()
            job.latents[...] = latents()
            jobs.append(job)
        return jobs

    def prepare(self, denoiser: BoundEngine, nets: Mapping[str, BoundEngine],
                active: Sequence[tuple[int, Job]]) -> None:
        """Enqueue the copies of what the next evaluation of the active jobs reads.

        denoiser: of `count` rows, or of twice as many with the negative prompts first. nets: ControlNets of as many
        rows, by name; the denoiser is then one that takes residuals. With frames of videos it is one for those.
        """
        if nets:
            self._bare.discard(denoiser)
        elif denoiser.group(STORE) and denoiser not in self._bare:
            residuals = denoiser.block(RESIDUAL)
            self.device.upload(residuals, np.zeros(residuals.shape, np.float32))
            self._bare.add(denoiser)
        for i, job in active:
            self._hold(denoiser, i, job, job.fixed)
            for name, given in job.control.items():
                if name in nets:
                    self._hold(nets[name], i, job, given.fixed)
            if job.table.draws[job.row]:
                self._put("noise", i, job.noise.randn(self.capacity.latent)[None])
            if job.renewed:
                self._renew(i, job)
            if job.memory and job.after:
                job.memory.read(denoiser, self._rows(denoiser, i), job.row)

    def launch(self, denoiser: BoundEngine, nets: Mapping[str, BoundEngine], active: Sequence[tuple[int, Job]]) -> None:
        """Enqueue one evaluation of every active job, whose `row` is then the next; watched ones are waited for and
        have their latents."""
        engines = (denoiser, *nets.values())
        step = self._steps[engines] = self._steps.get(engines) or self._bind(denoiser, nets)
        self.device.run(step.key, step.enqueue)
        for i, job in active:
            if job.memory:
                job.memory.write(denoiser, self._rows(denoiser, i), job.row, first=job.after is None)
        self._marks.append(self.device.mark())
        self._launched += 1
        while len(self._marks) > self._ahead:
            self._marks.popleft()()
        for _, job in active:
            job.row += 1
        watched = [(job, self.device.download(self._arrays["state"][i][0])) for i, job in active if job.watched]
        for job, wait in watched:
            job.latents[...] = wait()

    def _bind(self, denoiser: BoundEngine, nets: Mapping[str, BoundEngine]) -> _Step:
        sample = denoiser.buffers["sample"]
        work, key = [], [self._key]
        for name, engine in (*nets.items(), (DENOISER, denoiser)):
            widths = dict((*self.capacity.nets, (DENOISER, self.capacity.times)))[name]
            columns = self.device.zeros((len(widths), 3), np.int32)
            self.device.upload(columns, time_columns(dict(widths), engine.offsets))
            read = {array: self._arrays[array] for array in ("state", "table", "progress")}
            work += [self.device.kernel("step_input", **read, times=self._times[name], columns=columns,
                                        sample=engine.buffers["sample"], arena=engine.arena), engine.enqueue]
            if engine is not denoiser:
                x, out = engine.block(RESIDUAL), denoiser.block(RESIDUAL)
                if x.shape != out.shape:
                    raise EngineError(f"{name}: got {x.shape} numbers of residuals, expected {out.shape} as the "
                                      "denoiser takes; attach the ControlNet again")
                work.append(self.device.kernel("accumulate", x=x, keep=self._keep[len(key) > 1], out=out))
            key += [engine.key, signature({"columns": columns, "times": self._times[name]})]
        work.append(self.device.kernel("guidance_step", **self._arrays, noise_pred=denoiser.buffers["noise_pred"],
                                       sample=sample, timestep=self._timestep[:sample.shape[0]]))

        def enqueue(stream: Any) -> None:
            for launch in work:
                launch(stream)

        return _Step(tuple(key), enqueue)

    def _hold(self, engine: BoundEngine, i: int, job: Job, fixed: Mapping[str, np.ndarray]) -> None:
        """Give slot `i` of an engine what stays for a job, unless it has it."""
        held = self._held.setdefault(engine, [None] * self.count)
        if held[i] is not job:
            self._put_fixed(engine, i, fixed)
            for name in engine.group(STORE):
                self._put_fixed(engine, i, {name: np.full(2, job.after is None, np.float32)})
            held[i] = job

    def _put(self, name: str, i: int, values: np.ndarray) -> None:
        self.device.upload(self._arrays[name][i], values)

    def _put_fixed(self, denoiser: BoundEngine, i: int, fixed: Mapping[str, np.ndarray]) -> None:
        for name, values in fixed.items():  # without guidance both are the same row, the positive one last
            for row, value in zip(self._rows(denoiser, i), (values[:1], values[1:]), strict=True):
                self.device.upload(denoiser.buffers[name][row:row + 1], value)

    def _rows(self, denoiser: BoundEngine, i: int) -> tuple[int, int]:
        """Rows of slot `i`, negative prompt first."""
        return i, denoiser.buffers["sample"].shape[0] - self.count + i

    def _renew(self, i: int, job: Job) -> None:
        """Other noise for what is blended in before the next step; nothing is, after the last."""
        if job.row + 1 < job.table.rows:
            self.device.upload(self._arrays["known"][i][1], job.noise.randn(self.capacity.latent))
        else:
            self.device.upload(self._arrays["controls"][i][2:], np.zeros(1, np.float32))
