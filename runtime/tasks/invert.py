"""Invert: from a picture to the noise that DDIM draws it from, which is what `Result.latents` then are.

No other solver runs backwards; guidance 1 is best.
"""

from __future__ import annotations

from collections.abc import Iterator

from kernels.host.step import initial_state
from runtime.loop.job import Job
from runtime.networks.denoiser import Inputs
from runtime.request.plan import Plan
from runtime.tasks.model import Model
from runtime.tasks.start import Shared, generator, sample, start_of


def begin(plan: Plan, model: Model, text: Inputs) -> Iterator[Job]:
    """Yield the jobs of a plan's images; text: inputs of the denoiser that follow from it, [2, …] each."""
    shared, start = Shared(plan, model, text), start_of(plan, model)
    for image in range(plan.count):
        noise = generator(plan, image)
        x0 = sample(plan, start, noise, image)
        state = initial_state(plan.table, x0)
        state[0] = x0
        yield shared.job(image, noise, state)
