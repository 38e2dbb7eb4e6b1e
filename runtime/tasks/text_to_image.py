"""Text to image: from noise."""

from __future__ import annotations

from collections.abc import Iterator

from kernels.host.step import initial_state
from runtime.loop.job import Job
from runtime.networks.denoiser import Inputs
from runtime.request.plan import Plan
from runtime.tasks.model import Model
from runtime.tasks.start import Shared, first_noise, generator


def begin(plan: Plan, model: Model, text: Inputs) -> Iterator[Job]:
    """Yield the jobs of a plan's images; text: inputs of the denoiser that follow from it, [2, …] each."""
    shared = Shared(plan, model, text)
    for image in range(plan.count):
        noise = generator(plan, image)
        yield shared.job(image, noise, initial_state(plan.table, first_noise(plan, noise, image)))
