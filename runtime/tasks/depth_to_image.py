"""Depth to image: image to image, with a depth map as a channel of the denoiser's input."""

from __future__ import annotations

from collections.abc import Iterator

from runtime.loop.job import Job
from runtime.networks.denoiser import Inputs
from runtime.request.plan import Plan
from runtime.tasks.model import Model
from runtime.tasks.start import Shared, first_noise, generator, noised, sample, start_of


def begin(plan: Plan, model: Model, text: Inputs) -> Iterator[Job]:
    """Yield the jobs of a plan's images; text: inputs of the denoiser that follow from it, [2, …] each."""
    shared, start = Shared(plan, model, text), start_of(plan, model)
    assert plan.depth is not None
    for image in range(plan.count):
        noise = generator(plan, image)
        x0 = sample(plan, start, noise, image)
        yield shared.job(image, noise, noised(plan, x0, first_noise(plan, noise, image)), {"depth": plan.depth})
