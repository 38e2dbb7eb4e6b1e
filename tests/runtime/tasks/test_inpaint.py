"""Inpainting draws what diffusers' pipeline draws, with channels of its own and by blending."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from runtime import Request
from tests.tools.drawn import IMAGE, MASK, SIZE, assert_same, drawn_by, reference, request_of


@pytest.mark.parametrize("scheduler", ["ddim", "euler_ancestral", "dpm++_2m_karras"])
@pytest.mark.parametrize("name", ["inpainting", "inpainting_2"])
def test_inpainting_with_its_own_channels(made, name, scheduler):
    checkpoint, ours = made(name)
    request = request_of(image=IMAGE, mask=MASK, scheduler=scheduler)
    pipe = reference("StableDiffusionInpaintPipeline", checkpoint, scheduler)
    assert_same(ours, request, drawn_by(pipe, request, image=IMAGE, mask_image=MASK, height=SIZE[0], width=SIZE[1]))


def test_inpainting_with_its_own_channels_from_the_picture(made):
    checkpoint, ours = made("inpainting")
    request = request_of(image=IMAGE, mask=MASK, strength=0.7, count=2)
    pipe = reference("StableDiffusionInpaintPipeline", checkpoint)
    assert_same(ours, request, drawn_by(pipe, request, image=[IMAGE] * 2, mask_image=[MASK] * 2, strength=0.7,
                                        height=SIZE[0], width=SIZE[1]))


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "euler_ancestral"])
def test_inpainting_by_blending_as_diffusers_does_today(made, scheduler, strength):
    checkpoint, ours = made("sd1")
    request = request_of(image=IMAGE, mask=MASK, strength=strength, blend="next", scheduler=scheduler)
    pipe = reference("StableDiffusionInpaintPipeline", checkpoint, scheduler)
    assert_same(ours, request, drawn_by(pipe, request, image=IMAGE, mask_image=MASK, strength=strength,
                                        height=SIZE[0], width=SIZE[1]))


def blended(checkpoint: Path, request: Request, order: str, scheduler: str | None = None) -> np.ndarray:
    """Blended latent diffusion as published, in torch: noise of one draw and of the level of the step just taken
    ("current"), or with new noise before every step ("before", CompVis)."""
    pipe = reference("StableDiffusionPipeline", checkpoint, scheduler)
    generator = torch.Generator("cpu").manual_seed(request.seed)
    pixels = torch.from_numpy(np.array(IMAGE, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    grey = MASK.resize((SIZE[1] // pipe.vae_scale_factor, SIZE[0] // pipe.vae_scale_factor), Image.Resampling.NEAREST)
    keep = 1 - torch.from_numpy(np.array(grey, np.float32))[None, None] / 255
    text, negative = pipe.encode_prompt(request.prompt, "cpu", 1, True, request.negative_prompt)
    with torch.no_grad():
        known = pipe.vae.encode(pixels).latent_dist.sample(generator) * pipe.vae.config.scaling_factor
        noise = torch.randn(known.shape, generator=generator)
        pipe.scheduler.set_timesteps(request.steps)
        start = request.steps - int(request.steps * (request.strength or 1))
        times = pipe.scheduler.timesteps[start * pipe.scheduler.order:]
        levels = copy.deepcopy(pipe.scheduler)  # one that counts no steps, whose add_noise goes by the timestep
        if hasattr(pipe.scheduler, "set_begin_index"):
            pipe.scheduler.set_begin_index(start * pipe.scheduler.order)
        x = levels.add_noise(known, noise, times[:1])
        for t in times:
            if order == "before":
                fresh = torch.randn(known.shape, generator=generator)
                x = levels.add_noise(known, fresh, t[None]) * keep + x * (1 - keep)
            rows = pipe.scheduler.scale_model_input(torch.cat([x] * 2), t)
            uncond, cond = pipe.unet(rows, t, torch.cat([negative, text])).sample.chunk(2)
            x = pipe.scheduler.step(uncond + request.guidance * (cond - uncond), t, x).prev_sample
            if order == "current":
                x = levels.add_noise(known, noise, t[None]) * keep + x * (1 - keep)
        image = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    return (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("order", ["current", "before"])
@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm++_2m_karras"])
def test_inpainting_by_blending(made, scheduler, order):
    checkpoint, ours = made("sd1")
    request = request_of(image=IMAGE, mask=MASK, strength=0.75, blend=order, scheduler=scheduler)
    assert_same(ours, request, blended(checkpoint, request, order, scheduler))


def test_pasting_keeps_the_pixels_outside_the_mask(made):
    _, ours = made("sd1")
    request = request_of(image=IMAGE, mask=MASK, steps=2, seed=1)
    plain, pasted = (ours(dataclasses.replace(request, paste=value)).images[0] for value in (False, True))
    black, white = np.asarray(MASK) == 0, np.asarray(MASK) == 255
    assert np.array_equal(np.asarray(pasted)[black], np.asarray(IMAGE)[black])
    assert np.array_equal(np.asarray(pasted)[white], np.asarray(plain)[white])
    assert not np.array_equal(np.asarray(plain)[black], np.asarray(IMAGE)[black])
