"""Places for the denoising loop to run in tests, a UNet that is one line, and jobs that differ in everything.

`TorchHost` runs the loop's ops as the torch operators whose CUDA kernels a GPU runs; `Deferred` runs nothing before
somebody waits for it, as a GPU may.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np
import torch

import kernels.triton.accumulate
import kernels.triton.guidance_step
import kernels.triton.step_input
import kernels.triton.to_image  # noqa: F401 - registers torch.ops.latentrt, as the three above do
from engines import Engine, TensorSpec
from engines.onnx.low_rank import Weight
from kernels.host.step import advance, guide, initial_state
from runtime import Request
from runtime.devices.bound import BoundEngine
from runtime.devices.device import Device
from runtime.devices.host import Host
from runtime.loop.frames import Memory
from runtime.loop.job import Job, Place
from runtime.loop.loop import Loop
from runtime.loop.noise import Generator
from runtime.schedulers import make_table, names
from tests.runtime.schedulers.test_schedulers import STABLE

LATENT = (4, 6, 5)


class TorchHost(Host):
    """numpy arrays, and the torch operators of `kernels` on them."""

    def kernel(self, op: str, **arrays: np.ndarray) -> Callable[[Any], None]:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        function = getattr(torch.ops.latentrt, op)
        if op == "to_image":
            return lambda stream: tensors["out"].copy_(function(tensors["x"]))
        return lambda stream: function(**tensors)


class Deferred(TorchHost):
    """Everything that is enqueued waits in a queue. waits: how many entries were left behind by whom somebody waited
    for, at every wait."""

    asynchronous = True

    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []
        self.done = 0
        self.waits: list[int] = []

    def upload(self, target: np.ndarray, source: np.ndarray) -> None:
        copy = np.array(source)
        self.queue.append(lambda: Host.upload(self, target, copy))

    def copy(self, target: np.ndarray, source: np.ndarray) -> None:
        self.queue.append(lambda: Host.copy(self, target, source))

    def download(self, source: np.ndarray) -> Callable[[], np.ndarray]:
        found: list[np.ndarray] = []
        self.queue.append(lambda: found.append(source.copy()))
        wait = self.mark()
        return lambda: (wait(), found[0])[1]

    def run(self, key: Hashable, enqueue: Callable[[Any], None]) -> None:
        self.queue.append(lambda: enqueue(None))

    def mark(self) -> Callable[[], None]:
        position = len(self.queue)

        def wait() -> None:
            self.waits.append(len(self.queue) - position)
            while self.done < position:
                self.queue[self.done]()
                self.done += 1

        return wait


class Wave(Engine):
    """noise_pred = text[1, 2] · sin(sample + timestep / 300 + features[3]), by torch, for every row.

    It allocates nothing when it runs. number: of a GPU, or None for the CPU.
    """

    def __init__(self, rows: int, number: int | None = None) -> None:
        self.inputs = {spec.name: spec for spec in (
            TensorSpec("sample", "float32", (rows, *LATENT)), TensorSpec("timestep", "float32", (rows,)),
            TensorSpec("features", "float32", (rows, 70)), TensorSpec("text", "float32", (rows, 2, 3)))}
        self.outputs = {
            "noise_pred": TensorSpec("noise_pred", "float32", (rows, *LATENT))}
        self.gpu = number
        self.gain = 1.0
        self.rows_run: list[int] = []

    def bind(self, buffers: Mapping[str, Any]) -> None:
        where = "cpu" if self.gpu is None else f"cuda:{self.gpu}"
        self._tensors = {name: torch.as_tensor(buffer, device=where) for name, buffer in buffers.items()}
        self._shift = torch.empty_like(self._tensors["timestep"])

    def enqueue(self, stream: Any = None) -> None:
        on = contextlib.nullcontext()
        if stream is not None:
            on = torch.cuda.stream(torch.cuda.ExternalStream(int(stream.handle), self.gpu))
        with on:
            self.compute()
        self.rows_run.append(len(self._shift))

    def compute(self) -> None:
        t = self._tensors
        torch.div(t["timestep"], 300, out=self._shift)
        self._shift.add_(t["features"][:, 3])
        torch.add(t["sample"], self._shift[:, None, None, None], out=t["noise_pred"])
        t["noise_pred"].sin_().mul_(t["text"][:, 1, 2][:, None, None, None]).mul_(self.gain)

    def refit(self, weights: Mapping[str, Weight]) -> None:
        self.gain = float(np.asarray(weights["gain"]))


class ControlledWave(Wave):
    """`Wave` + residual_0 + the third number of residual_1."""

    def __init__(self, rows: int, number: int | None = None) -> None:
        super().__init__(rows, number)
        self.inputs = {**self.inputs, **residuals(rows)}

    def compute(self) -> None:
        super().compute()
        self._tensors["noise_pred"].add_(self._tensors["residual_0"]).add_(
            self._tensors["residual_1"][:, 2][:, None, None, None])


class FramedWave(ControlledWave):
    """`ControlledWave`, and attention to other frames of a video: hidden_0 is a line of the sample times text[1, 2],
    and that line of noise_pred gets a tenth of how those of the first frame differ, and two tenths of how those of the
    one before do.
    """

    def __init__(self, rows: int, number: int | None = None) -> None:
        super().__init__(rows, number)
        shape = (rows, 2, LATENT[2])
        self.inputs = {**self.inputs, "store": TensorSpec("store", "float32", (rows,), "store"),
                       **{f"{group}_0": TensorSpec(f"{group}_0", "float32", shape, group)
                          for group in ("first", "previous")}}
        self.outputs = {**self.outputs, "hidden_0": TensorSpec("hidden_0", "float32", shape, "hidden")}

    def bind(self, buffers: Mapping[str, Any]) -> None:
        super().bind(buffers)
        self._told, self._other = (torch.empty_like(self._tensors[name]) for name in ("hidden_0", "store"))

    def compute(self) -> None:
        super().compute()
        t, line = self._tensors, self._tensors["noise_pred"][:, :2, 0]
        torch.mul(t["sample"][:, :2, 0], t["text"][:, 1, 2][:, None, None], out=t["hidden_0"])
        torch.sub(1, t["store"], out=self._other)
        for name, share in (("first_0", 0.1), ("previous_0", 0.2)):
            torch.sub(t[name], t["hidden_0"], out=self._told)
            line.add_(self._told.mul_(self._other[:, None, None]).mul_(share))


class Ripple(Wave):
    """A ControlNet: residual_0 = scale / 10 · sin(sample + timestep / 300 + hint[1]), residual_1 = scale · hint."""

    def __init__(self, rows: int, number: int | None = None) -> None:
        super().__init__(rows, number)
        self.inputs = {"sample": self.inputs["sample"], "timestep": self.inputs["timestep"],
                       "scale": TensorSpec("scale", "float32", (rows,)),
                       "hint": TensorSpec("hint", "float32", (rows, 5))}
        self.outputs = residuals(rows)

    def compute(self) -> None:
        t, down = self._tensors, (slice(None), None, None, None)
        torch.add(t["sample"], (t["timestep"] / 300 + t["hint"][:, 1])[down], out=t["residual_0"])
        t["residual_0"].sin_().mul_(t["scale"][down] / 10)
        torch.mul(t["scale"][:, None], t["hint"], out=t["residual_1"])


def residuals(rows: int) -> dict[str, TensorSpec]:
    return {"residual_0": TensorSpec("residual_0", "float32", (rows, *LATENT), "residual"),
            "residual_1": TensorSpec("residual_1", "float32", (rows, 5), "residual")}


def job(index: int, seed: int = 0, steps: int = 5, **options: Any) -> Job:
    """A job of the UNet `Wave`; options: of a Request, `config` of the checkpoint's scheduler."""
    config = STABLE | options.pop("config", {})
    table = make_table(config, steps, scheduler=options.get("scheduler"), eta=options.get("eta", 0.0))
    request = Request("", steps=steps, seed=seed, **options)
    rng, noise = np.random.default_rng(seed), Generator(seed)
    text = {"text": rng.uniform(0.4, 0.8, (2, 2, 3)).astype(np.float32)}  # mild, or rounding grows from step to step
    time = {"timestep": table.timesteps.astype(np.float32),
            "features": rng.standard_normal((table.rows, 70)).astype(np.float32)}
    return Job(request, index, 0, text, time, table, noise, initial_state(table, noise.randn(LATENT)))


def mixed() -> list[Job]:
    """Every sampler; guided, unguided, rescaled and noisy in turn; of 1 to 15 evaluations."""
    controls: tuple[dict[str, Any], ...] = ({}, {"guidance": 1.0}, {"guidance": 4.0, "guidance_rescale": 0.7})
    jobs = [job(i, seed=i, steps=3 + i % 4, scheduler=name, **controls[i % 3]) for i, name in enumerate(names())]
    more: tuple[dict[str, Any], ...] = (
        {"steps": 1}, {"scheduler": "ddim", "eta": 0.5}, {"config": {"skip_prk_steps": False}},
        {"config": {"_class_name": "DDIMScheduler", "clip_sample": True}, "guidance": 0.5})
    return jobs + [job(len(jobs) + k, seed=100 + k, **options) for k, options in enumerate(more)]


def expected(job: Job, steps: int | None = None) -> np.ndarray:
    """The latents of one job after so many evaluations, one by one by `kernels.host.step`; `job` is used up."""
    state = job.state.copy()
    text = job.fixed["text"][:, 1, 2]
    for i in range(job.table.rows if steps is None else steps):
        time, sample = job.time["timestep"][i] / 300, state[0] * np.float32(job.table.input_scale[i])
        rows = [value * np.sin(sample + time + job.time["features"][i, 3]) for value in text]
        for net in job.control.values():
            for row, hint in enumerate(net.fixed["hint"]):
                rows[row] = rows[row] + net.time["scale"][i] * (np.sin(sample + time + hint[1]) / 10 + hint[2])
        m = rows[1]
        if job.request.guided:
            m = guide(rows[0], m, job.request.guidance, job.request.guidance_rescale)
        draw = job.noise.randn(LATENT) if job.table.draws[i] else None
        advance(state, m, draw, job.table, i)
    return state[0]


def waves(device: Device, number: int | None = None, kind: type[Wave] = Wave) -> Callable[..., BoundEngine]:
    """The bound UNet of so many rows and of a variant, made at its first use."""
    kinds: dict[str, type[Wave]] = {"": kind, "control": ControlledWave, "frames": FramedWave}
    bound: dict[tuple[int, str], BoundEngine] = {}

    def unet(rows: int, variant: str = "") -> BoundEngine:
        key = rows, variant
        if key not in bound:
            bound[key] = BoundEngine(kinds[variant](rows, number), device)
        return bound[key]

    return unet


class Waves:
    """Engines of a loop: `waves` for every place, and `Ripple` for every ControlNet."""

    def __init__(self, device: Device, number: int | None = None,
                 unet: Callable[..., BoundEngine] | None = None) -> None:
        self.unet = unet or waves(device, number)
        self.nets: dict[str, Callable[..., BoundEngine]] = {}
        self._device, self._number = device, number
        self._unets: dict[object, Callable[..., BoundEngine]] = {}

    def denoiser(self, place: Place, rows: int, variant: str) -> BoundEngine:
        if place.lane not in self._unets:
            self._unets[place.lane] = waves(self._device, self._number) if self._unets else self.unet
        return self._unets[place.lane](rows, variant)

    def net(self, name: str, place: Place, rows: int) -> BoundEngine:
        if name not in self.nets:
            self.nets[name] = waves(self._device, self._number, Ripple)
        return self.nets[name](rows)


def run(loop: Loop, jobs: list[Job]) -> list[Job]:
    """Submit jobs and step the loop until all have ended; returns them in the order in which they did."""
    for one in jobs:
        loop.submit(one)
    ended = []
    while loop.busy:
        ended += loop.step()
    return ended


def video(index: int, frames: int = 4, **options: Any) -> list[Job]:
    """Frames that differ in their noise."""
    memory = Memory(job(index, **options).table.rows)
    made = [job(index, seed=10 * index + n, **options) for n in range(frames)]
    for n, one in enumerate(made):
        one.memory, one.after = memory, made[n - 1] if n else None
    return made


def expected_video(frames: list[Job]) -> list[np.ndarray]:
    """Each after the other in numpy; what the first and the last have seen is kept by the number of the step."""
    first: dict[int, np.ndarray] = {}
    previous: dict[int, np.ndarray] = {}
    found = []
    for one in frames:
        state, text = one.state.copy(), one.fixed["text"][:, 1, 2]
        for i in range(one.table.rows):
            sample = state[0] * np.float32(one.table.input_scale[i])
            shift = one.time["timestep"][i] / 300 + one.time["features"][i, 3]
            hidden = text[:, None, None] * sample[:2, 0]
            seen = [hidden, hidden] if one.after is None else [first[i], previous[i]]
            first.setdefault(i, hidden)
            previous[i] = hidden
            rows = text[:, None, None, None] * np.sin(sample + shift)
            rows[:, :2, 0] += 0.1 * (seen[0] - hidden) + 0.2 * (seen[1] - hidden)
            m = guide(rows[0], rows[1], one.request.guidance, one.request.guidance_rescale) \
                if one.request.guided else rows[1]
            advance(state, m, one.noise.randn(LATENT) if one.table.draws[i] else None, one.table, i)
        found.append(state[0])
    return found
