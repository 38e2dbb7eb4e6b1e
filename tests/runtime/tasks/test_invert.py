"""Inversion finds the noise that DDIM draws a picture from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.tools.drawn import IMAGE, PROMPT, SIZE, reference, request_of


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_inversion(made, name):
    """The published loop in torch, for noise and v."""
    checkpoint, ours = made(name)
    pipe = reference("StableDiffusionPipeline", checkpoint, "ddim")
    pixels = torch.from_numpy(np.array(IMAGE, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    text, _ = pipe.encode_prompt(PROMPT, "cpu", 1, False)
    pipe.scheduler.set_timesteps(10)
    with torch.no_grad():
        z = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        before = pipe.scheduler.final_alpha_cumprod
        for t in reversed(pipe.scheduler.timesteps):
            now, m = pipe.scheduler.alphas_cumprod[t], pipe.unet(z, t, text).sample
            noise = m if name == "sd1" else before.sqrt() * m + (1 - before).sqrt() * z
            z = now.sqrt() * (z - (1 - before).sqrt() * noise) / before.sqrt() + (1 - now).sqrt() * noise
            before = now
    request = request_of(image=IMAGE, task="invert", guidance=1.0, steps=10, output="latent")
    noise = ours(request).latents
    np.testing.assert_allclose(noise, z.numpy(), atol=1e-3, rtol=1e-3)


def test_ddim_draws_an_inverted_picture_again(made):
    _, ours = made("shapes")
    options = {"prompt": "a red circle", "guidance": 1.0, "steps": 20, "scheduler": "ddim"}
    drawn = ours(request_of(**options, height=SIZE[0], width=SIZE[1], seed=5))
    inverted = ours(request_of(**options, image=drawn.latents, task="invert", output="latent"))
    back, other = (ours(request_of(**options, height=SIZE[0], width=SIZE[1], latents=start)).latents - drawn.latents
                   for start in (inverted.latents, None))
    assert np.linalg.norm(back) < 0.25 * np.linalg.norm(other)
