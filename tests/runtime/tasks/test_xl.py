"""Stable Diffusion XL and its refiner draw what diffusers' pipelines draw."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.tools.drawn import IMAGE, NEGATIVE, PROMPT, SIZE, assert_same, drawn_by, reference, request_of


@pytest.mark.parametrize("negative", [NEGATIVE, None], ids=["negative", "zeros"])
@pytest.mark.parametrize("scheduler", [None, "dpm++_2m_karras"])
def test_xl(made, scheduler, negative):
    checkpoint, ours = made("sdxl")
    request = request_of(negative_prompt=negative, original_size=(48, 96), crop=(4, 8), scheduler=scheduler,
                         height=SIZE[0], width=SIZE[1])
    pipe = reference("StableDiffusionXLPipeline", checkpoint, scheduler)
    expected = pipe(PROMPT, negative_prompt=negative, num_inference_steps=6, guidance_scale=7.5, output_type="np",
                    height=SIZE[0], width=SIZE[1], original_size=(48, 96), crops_coords_top_left=(4, 8),
                    generator=torch.Generator("cpu").manual_seed(3)).images
    assert_same(ours, request, expected)


def test_xl_hands_over_to_the_refiner(made):
    """The base model ends at 60 % of the schedule, and the refiner begins there with its latents."""
    checkpoint, base = made("sdxl")
    refiner_checkpoint, refiner = made("refiner")
    request = request_of(steps=10, height=SIZE[0], width=SIZE[1], denoising_end=0.6, output="latent")
    latents = base(request).latents
    first = reference("StableDiffusionXLPipeline", checkpoint)
    handed = first(PROMPT, negative_prompt=NEGATIVE, num_inference_steps=10, guidance_scale=7.5, output_type="latent",
                   height=SIZE[0], width=SIZE[1], denoising_end=0.6,
                   generator=torch.Generator("cpu").manual_seed(3)).images
    np.testing.assert_allclose(latents, handed.numpy(), atol=1e-3, rtol=1e-3)
    second = reference("StableDiffusionXLImg2ImgPipeline", refiner_checkpoint)
    follow = request_of(steps=10, image=latents, denoising_start=0.6)
    expected = second(PROMPT, negative_prompt=NEGATIVE, num_inference_steps=10, guidance_scale=7.5, output_type="np",
                      image=torch.from_numpy(latents), denoising_start=0.6,
                      generator=torch.Generator("cpu").manual_seed(3)).images
    assert_same(refiner, follow, expected)


def test_xl_image_to_image(made):
    checkpoint, ours = made("sdxl")
    request = request_of(image=IMAGE, strength=0.5)
    pipe = reference("StableDiffusionXLImg2ImgPipeline", checkpoint)
    assert_same(ours, request, drawn_by(pipe, request, image=IMAGE, strength=0.5))
