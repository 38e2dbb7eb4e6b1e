"""The start of a plan's images, as far as the tasks have it in common.

Noise is drawn in the order in which diffusers draws it: that of a low-resolution picture, of the picture's latents, of
the start, of the masked picture's latents. A task draws from one generator an image, in the order of its lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from kernels.host.step import initial_state
from runtime.loop.job import Job
from runtime.loop.noise import Generator
from runtime.networks.denoiser import Denoiser, Inputs
from runtime.networks.first_stage import Encoded
from runtime.pictures import read as pictures
from runtime.pictures.hints import PREPROCESSORS
from runtime.request.control import Conditions, Control
from runtime.request.option import options_of
from runtime.request.plan import Plan
from runtime.request.request import Request
from runtime.request.task import value_without
from runtime.schedulers import Table
from runtime.tasks.model import Model


class Shared:
    """The inputs that all images of a plan share: they are computed once, and handed to the job of each.

    text: inputs of the denoiser that follow from the text, [2, …] each, negative prompt first.
    """

    def __init__(self, plan: Plan, model: Model, text: Inputs) -> None:
        told = {**text, **numbers(plan, model)}
        times = plan.table.timesteps
        self._plan = plan
        self._joined = {condition.meaning: condition.input for condition in model.manifest.joined}
        self._fixed, self._time = model.denoiser.fixed(told), model.denoiser.time(times)
        self._nets = {control.name: model.net(control.name) for control in plan.request.control}
        self._control = {
            control.name: Conditions(net.fixed(told), {**net.time(times), "scale": control.scales(plan.table.rows)})
            for control, net in zip(plan.request.control, self._nets.values(), strict=True)}
        self._hints: dict[tuple[str, int], Inputs] = {}

    def job(self, image: int, noise: Generator, state: np.ndarray, channels: Mapping[str, np.ndarray] | None = None, *,
            table: Table | None = None, **more: Any) -> Job:
        """Return the job of image number `image`, which begins with `state`.

        channels: what is joined to the sample, by its meaning, the same with and without the negative prompt. table:
        another than the plan's. more: other fields of the job.
        """
        rows = {self._joined[meaning]: np.broadcast_to(value, (2, *value.shape))
                for meaning, value in (channels or {}).items()}
        return Job(self._plan.request, 0, image, {**self._fixed, **rows}, self._time, table or self._plan.table, noise,
                   state, control=self._controlled(image), **more)

    def _controlled(self, image: int) -> dict[str, Conditions]:
        """Return the inputs of the ControlNets for an image, by their names, with those made of its hints."""
        conditions = {}
        for control, hints in zip(self._plan.request.control, self._plan.hints, strict=True):
            key = (control.name, image % len(hints))
            if key not in self._hints:
                self._hints[key] = _hint(control, self._nets[control.name], hints[key[1]], self._plan.size)
            shared = self._control[control.name]
            conditions[control.name] = Conditions({**shared.fixed, **self._hints[key]}, shared.time)
        return conditions


def generator(plan: Plan, image: int) -> Generator:
    """Return the noise of image number `image`."""
    return Generator(plan.seed + image)


def first_noise(plan: Plan, noise: Generator, image: int) -> np.ndarray:
    """Return the unit-variance noise of an image, float32 [C, h, w]: drawn, unless the request brings it."""
    return noise.randn(plan.shape) if plan.request.latents is None else plan.request.latents[image]


def pixels(plan: Plan) -> np.ndarray:
    """Return the plan's picture as float32 [3, height, width] in [-1, 1]."""
    assert isinstance(plan.image, Image.Image)
    return pictures.pixels(plan.image, plan.size)


def start_of(plan: Plan, model: Model) -> Encoded | np.ndarray:
    """Return the latents that a plan begins with: of its picture, or those that were given, [count, C, h, w]."""
    return plan.image if isinstance(plan.image, np.ndarray) else model.encode(pixels(plan))


def sample(plan: Plan, encoded: Encoded | np.ndarray, noise: Generator, image: int) -> np.ndarray:
    """Return the latents of image number `image`, float32 [C, h, w]; a sample of them is drawn with `noise`."""
    if isinstance(encoded, np.ndarray):
        return encoded[image]
    if plan.request.encoding == "mean" or (plan.request.encoding is None and plan.task == "invert"):
        return encoded.mean
    return encoded.mean + encoded.std * noise.randn(plan.shape)


def level_of(table: Table) -> tuple[np.float32, np.float32]:
    """Return signal and sigma where a table begins: x = signal · x0 + sigma · noise."""
    return np.float32(table.signal[0]), np.float32(table.sigma[0])


def noised(plan: Plan, x0: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Return the state that begins with latents `x0`, noised to the level of the first row unless they have it."""
    state = initial_state(plan.table, first)
    signal, sigma = level_of(plan.table)
    state[0] = x0 if plan.request.denoising_start is not None else signal * x0 + sigma * first
    return state


def numbers(plan: Plan, model: Model) -> Inputs:
    """Return the labels and sizes that the networks take all through a request, by input, [2, …] each."""
    inputs: Inputs = {}
    for condition in model.manifest.conditions:
        if condition.source == "numbers":
            spec = model.input(condition.input)
            rows = [[number for field in condition.fields for number in _numbers(plan, prefix + field)]
                    for prefix in ("negative_", "")]
            inputs[spec.name] = np.array(rows, spec.dtype).reshape(2, *spec.shape[1:])
    return inputs


def _numbers(plan: Plan, name: str) -> Sequence[float]:
    """Return the numbers of an option, or those of the prompt where the negative prompt has none of its own."""
    if name not in options_of(Request):
        return _numbers(plan, name.removeprefix("negative_"))
    value = vars(plan.request)[name]
    if value is None:
        value = value_without(name)
    if value is None:
        value = plan.size
    return value if isinstance(value, tuple) else (value,)


def _hint(control: Control, net: Denoiser, picture: Image.Image, size: tuple[int, int]) -> Inputs:
    """Return the inputs that a ControlNet makes of a hint, [2, …] each."""
    preprocess = PREPROCESSORS[control.preprocessor] if control.preprocessor else None
    made = net.hint(pictures.hint(picture, size, preprocess))
    return {name: np.broadcast_to(value, (2, *value.shape[1:])) for name, value in made.items()}
