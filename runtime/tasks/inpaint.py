"""Inpaint: image to image, where only what a mask says is drawn anew.

A model made for it is given mask and masked picture as channels of the denoiser's input. With any other, what is black
in the mask becomes the picture's again after every step (Avrahami et al., Blended Latent Diffusion, 2022).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

from kernels.host.step import initial_state
from runtime.loop.job import Job
from runtime.networks.denoiser import Inputs
from runtime.pictures import read as pictures
from runtime.request.plan import Plan
from runtime.request.task import takes_mask
from runtime.tasks.model import Model
from runtime.tasks.start import Shared, first_noise, generator, level_of, noised, pixels, sample, start_of


def begin(plan: Plan, model: Model, text: Inputs) -> Iterator[Job]:
    """Yield the jobs of a plan's images; text: inputs of the denoiser that follow from it, [2, …] each."""
    return (_with_channels if takes_mask(model.manifest) else _by_blending)(plan, model, text)


def paste(plan: Plan, image: Image.Image) -> Image.Image:
    """Return the picture drawn, with the pixels of the plan's picture where its mask is black."""
    assert isinstance(plan.image, Image.Image) and plan.mask is not None
    return Image.composite(image, plan.image.convert("RGB").resize(image.size, Image.Resampling.LANCZOS),
                           plan.mask.convert("L").resize(image.size, Image.Resampling.LANCZOS))


def _with_channels(plan: Plan, model: Model, text: Inputs) -> Iterator[Job]:
    """Yield jobs that start from noise alone unless strength is below 1."""
    shared, picture = Shared(plan, model, text), pixels(plan)
    assert plan.mask is not None
    mask = pictures.hard_mask(plan.mask, plan.size)
    start = None if plan.request.strength == 1 else model.encode(picture)
    masked = model.encode(picture * (1 - mask))
    small = mask[None, ::plan.factor, ::plan.factor]
    for image in range(plan.count):
        noise = generator(plan, image)
        if start is None:
            state = initial_state(plan.table, first_noise(plan, noise, image))
        else:
            x0 = sample(plan, start, noise, image)
            state = noised(plan, x0, first_noise(plan, noise, image))
        yield shared.job(image, noise, state, {"mask": small, "masked_image": sample(plan, masked, noise, image)})


def _by_blending(plan: Plan, model: Model, text: Inputs) -> Iterator[Job]:
    """Yield jobs with the picture to blend in, at the level of the last step or of the next, or with new noise."""
    request, shared, start = plan.request, Shared(plan, model, text), start_of(plan, model)
    keep, (signal, sigma) = _keep(plan), level_of(plan.table)
    table = plan.table if request.blend == "current" else plan.table.following()
    for image in range(plan.count):
        noise = generator(plan, image)
        x0 = sample(plan, start, noise, image)
        first = first_noise(plan, noise, image)
        if request.blend == "next" and request.strength == 1 and request.denoising_start is None:
            state = initial_state(plan.table, first)
        else:
            state = noised(plan, x0, first)
        known = np.stack([x0, first, keep])
        if request.blend == "next":
            noise.randn(plan.shape)  # diffusers encodes the masked picture for these too, and does not use it
        elif request.blend == "before":
            known[1] = noise.randn(plan.shape)
            state[0] = keep * (signal * x0 + sigma * known[1]) + (1 - keep) * state[0]
        yield shared.job(image, noise, state, table=table, known=known, renewed=request.blend == "before")


def _keep(plan: Plan) -> np.ndarray:
    """Return the share of the picture that stays, float32 [C, h, w]: 1 where its mask is black."""
    assert plan.mask is not None
    if plan.request.blend == "next":
        mask = pictures.hard_mask(plan.mask, plan.size)[::plan.factor, ::plan.factor]
    else:
        mask = pictures.soft_mask(plan.mask, plan.shape[1:])
    return np.broadcast_to(1 - mask, plan.shape)
