"""Video: every frame image to image, by a denoiser that attends to the first frame and to the one before."""

from __future__ import annotations

from collections.abc import Iterator

from runtime.loop.frames import Memory
from runtime.loop.job import Job
from runtime.networks.denoiser import Inputs
from runtime.pictures import read as pictures
from runtime.request.plan import Plan
from runtime.tasks.model import Model
from runtime.tasks.start import Shared, first_noise, generator, noised, sample


def begin(plan: Plan, model: Model, text: Inputs) -> Iterator[Job]:
    """Yield the jobs of a plan's frames; text: inputs of the denoiser that follow from it, [2, …] each."""
    shared, memory, before = Shared(plan, model, text), Memory(plan.table.rows), None
    assert plan.clip
    for image, frame in enumerate(plan.clip.frames):
        noise = generator(plan, image)
        x0 = sample(plan, model.encode(pictures.pixels(frame, plan.size)), noise, image)
        state = noised(plan, x0, first_noise(plan, noise, image))
        before = shared.job(image, noise, state, memory=memory, after=before)
        yield before
