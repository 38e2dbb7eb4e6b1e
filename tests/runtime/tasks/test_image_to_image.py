"""Image to image draws what diffusers' pipeline draws: same weights, pictures and seeds, fp32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runtime import Pipeline
from runtime.pictures import read as pictures
from runtime.pictures import tiles
from tests.tolerances import IMAGE_MAX
from tests.tools.drawn import IMAGE, assert_same, drawn_by, picture, reference, request_of

SAMPLERS = ["ddim", "pndm", "euler", "euler_ancestral", "dpm++_2m_karras", "heun", "unipc"]


@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_image_to_image(made, scheduler):
    checkpoint, ours = made("sd1")
    request = request_of(image=IMAGE, strength=0.6, scheduler=scheduler)
    pipe = reference("StableDiffusionImg2ImgPipeline", checkpoint, scheduler)
    assert_same(ours, request, drawn_by(pipe, request, image=IMAGE, strength=0.6))


@pytest.mark.parametrize(("name", "options"), [
    ("sd1", {"strength": 1.0, "count": 2}), ("sd1", {"guidance": 1.0, "strength": 0.35}),
    ("sd2", {"strength": 0.5, "count": 3})], ids=["whole-two", "unguided", "sd2-three"])
def test_image_to_image_of_other_models_and_batches(made, name, options):
    checkpoint, ours = made(name)
    request = request_of(image=IMAGE, **options)
    pipe = reference("StableDiffusionImg2ImgPipeline", checkpoint)
    images = [IMAGE] * request.count
    assert_same(ours, request, drawn_by(pipe, request, image=images, strength=request.strength))


def test_a_large_picture_in_tiles(made):
    """Tiles of 64 pixels, each through diffusers' VAE, are what is started from and what is seen."""
    checkpoint, whole = made("sd1")
    ours = Pipeline.load(whole.bundle.path, "onnxruntime", size=(64, 64), progress=False, tile=64)
    vae, (height, width) = reference("StableDiffusionPipeline", checkpoint).vae, (64, 192)
    image, scale, factor = picture(height, width), vae.config.scaling_factor, 8

    def encode(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = vae.encode(torch.from_numpy(part)[None]).latent_dist
        return found.mean[0].numpy() * scale, found.std[0].numpy() * scale

    def decode(part: np.ndarray) -> np.ndarray:
        return vae.decode(torch.from_numpy(part)[None] / scale).sample[0].numpy()

    with torch.no_grad():
        mean, _ = tiles.encode(pictures.pixels(image, (height, width)), encode, (8, 8), factor)
        clean = ours(request_of(image=mean, strength=0.3, steps=4, output="latent")).latents
        result = ours(request_of(image=image, encoding="mean", strength=0.3, steps=4))
        np.testing.assert_allclose(result.latents, clean, atol=1e-3)
        expected = tiles.decode(result.latents[0], decode, (8, 8), factor) / 2 + 0.5
    expected = expected.clip(0, 1).transpose(1, 2, 0)
    np.testing.assert_allclose(ours.decode(result.latents)[0], expected, atol=IMAGE_MAX)
    np.testing.assert_allclose(np.asarray(result.images[0]) / 255, expected, atol=0.5 / 255 + IMAGE_MAX)
    assert np.abs(whole.decode(result.latents)[0] - expected).max() > IMAGE_MAX
