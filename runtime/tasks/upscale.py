"""Upscale: from noise, with a noised low-resolution picture as channels of the denoiser's input."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

from kernels.host.step import initial_state
from runtime.loop.job import Job
from runtime.networks.denoiser import Inputs
from runtime.pictures import read as pictures
from runtime.request.plan import Plan
from runtime.schedulers import signal_and_sigma
from runtime.tasks.model import Model
from runtime.tasks.start import Shared, first_noise, generator


def begin(plan: Plan, model: Model, text: Inputs) -> Iterator[Job]:
    """Yield the jobs of a plan's images; text: inputs of the denoiser that follow from it, [2, …] each."""
    shared, level = Shared(plan, model, text), plan.request.noise_level
    assert model.manifest.low_res_scheduler and level is not None and isinstance(plan.image, Image.Image)
    signal, sigma = signal_and_sigma(model.manifest.low_res_scheduler, level)
    small = pictures.pixels(plan.image, plan.shape[1:])  # of the size of the latents, at the level the denoiser is told
    for image in range(plan.count):
        noise = generator(plan, image)
        low = np.float32(signal) * small + np.float32(sigma) * noise.randn(small.shape)
        state = initial_state(plan.table, first_noise(plan, noise, image))
        yield shared.job(image, noise, state, {"low_resolution": low})
