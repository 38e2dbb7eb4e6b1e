"""Every task draws what diffusers' pipeline of that task draws: same weights, pictures and seeds, fp32."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from runtime import Pipeline, Request
from runtime.__main__ import main
from runtime.pictures import read as pictures
from runtime.pictures import tiles
from runtime.schedulers import SCHEDULERS
from tests.tolerances import IMAGE_MAX

SIZE = (64, 128)
PROMPT, NEGATIVE = "a cat and a horse", "rain"
SAMPLERS = ["ddim", "pndm", "euler", "euler_ancestral", "dpm++_2m_karras", "heun", "unipc"]


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Coloured waves."""
    phase = np.random.default_rng(seed).uniform(0, 6, 3)
    y, x = np.mgrid[:height, :width] / 9
    waves = [np.sin(x * (1 + k / 3) + p) + np.cos(y + k * p) for k, p in enumerate(phase)]
    return Image.fromarray(((np.stack(waves, axis=2) + 2) * 63.75).astype(np.uint8))


def disc(height: int, width: int) -> Image.Image:
    """White with a soft edge on black: a mask."""
    y, x = np.mgrid[:height, :width]
    away = np.hypot(y - height / 2, x - width / 3)
    return Image.fromarray(((height / 3 - away) * 40 + 128).clip(0, 255).astype(np.uint8))


IMAGE, MASK = picture(*SIZE), disc(*SIZE)
DEPTH = np.hypot(*np.mgrid[:48, :100]).astype(np.float32)


@pytest.fixture(scope="module")
def made(checkpoints, bundles):
    """Name in models/tiny.py → (diffusers checkpoint, our pipeline)."""

    @functools.cache
    def make(name: str) -> tuple[Path, Pipeline]:
        return checkpoints[name], Pipeline.load(bundles[name], "onnxruntime", size=SIZE, progress=False)

    return make


def reference(kind: str, checkpoint: Path, scheduler: str | None = None) -> Any:
    pipe = getattr(diffusers, kind).from_pretrained(checkpoint, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if scheduler:
        short, karras, _ = scheduler.partition("_karras")
        name, overrides = SCHEDULERS[short]
        overrides = {**overrides, "use_karras_sigmas": True} if karras else overrides
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **overrides)
    return pipe


def drawn_by(pipe: Any, request: Request, **options: Any) -> np.ndarray:
    """float32 [n, H, W, 3] of diffusers for images of consecutive seeds."""
    seed = request.seed or 0
    return pipe([request.prompt] * request.count, negative_prompt=[request.negative_prompt] * request.count,
                num_inference_steps=request.steps, guidance_scale=request.guidance, output_type="np",
                generator=[torch.Generator("cpu").manual_seed(seed + i) for i in range(request.count)],
                **options).images


def request_of(**options: Any) -> Request:
    return Request(**{"prompt": PROMPT, "negative_prompt": NEGATIVE, "steps": 6, "seed": 3, **options})


def assert_same(ours: Pipeline, request: Request, expected: np.ndarray) -> None:
    got = ours.decode(ours(dataclasses.replace(request, output="latent")).latents)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=IMAGE_MAX, rtol=0)


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


@pytest.mark.parametrize("scheduler", [None, "euler"])
def test_depth(made, scheduler):
    checkpoint, ours = made("depth")
    request = request_of(image=IMAGE, depth=DEPTH, strength=0.7, scheduler=scheduler)
    pipe = reference("StableDiffusionDepth2ImgPipeline", checkpoint, scheduler)
    assert_same(ours, request, drawn_by(pipe, request, image=IMAGE, depth_map=torch.from_numpy(DEPTH)[None],
                                        strength=0.7))


def test_a_depth_estimator_is_asked_where_no_depth_is_given(made):
    _, ours = made("depth")
    seen = []

    def estimate(image):
        seen.append(image.size)
        return DEPTH

    with_hook = Pipeline.load(ours.bundle.path, "onnxruntime", size=SIZE, progress=False, depth_estimator=estimate)
    request = request_of(image=IMAGE, steps=2)
    expected = ours(dataclasses.replace(request, depth=DEPTH)).latents
    np.testing.assert_array_equal(with_hook(request).latents, expected)
    assert seen == [SIZE[::-1]]


@pytest.mark.parametrize("level", [20, 250])
def test_upscaler(made, level):
    checkpoint, ours = made("upscaler")
    small = picture(32, 16, seed=1)
    request = request_of(image=small, noise_level=level, seed=9)
    pipe = reference("StableDiffusionUpscalePipeline", checkpoint)
    expected = drawn_by(pipe, request, image=small, noise_level=level)
    assert expected.shape == (1, 128, 64, 3)
    assert_same(ours, request, expected)


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


SMALL = picture(16, 32, seed=1)
EACH = {  # task, and by what → model, and what the request brings
    "text-to-image": ("sd1", {}), "image-to-image": ("sd1", {"image": IMAGE, "strength": 0.5}),
    "inpaint-blended": ("sd1", {"image": IMAGE, "mask": MASK}), "invert": ("sd2", {
        "image": IMAGE, "task": "invert", "guidance": 1.0, "output": "latent"}),
    "inpaint-sd1": ("inpainting", {"image": IMAGE, "mask": MASK}),
    "inpaint-sd2": ("inpainting_2", {"image": IMAGE, "mask": MASK}),
    "depth-to-image": ("depth", {"image": IMAGE, "depth": DEPTH}), "upscale": ("upscaler", {"image": SMALL}),
    "xl": ("sdxl", {}), "refiner": ("refiner", {"image": IMAGE, "strength": 0.7})}


@pytest.mark.parametrize("task", EACH)
def test_every_task_on_openvino(made, task):
    name, options = EACH[task]
    _, ours = made(name)
    if not {"image"} & options.keys():
        options = {"height": SIZE[0], "width": SIZE[1], **options}
    other = Pipeline.load(ours.bundle.path, "openvino", dtype="fp32", size=SIZE, progress=False)
    request = request_of(steps=3, **options)
    np.testing.assert_allclose(other(request).latents, ours(request).latents, atol=2e-3, rtol=1e-3)


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


def test_tasks_of_one_batch(made):
    """Text, a picture and a mask in one batch of two slots: each as when it is alone."""
    _, one = made("sd1")
    ours = Pipeline.load(one.bundle.path, "onnxruntime", size=SIZE, batch=2, progress=False)
    size = {"height": SIZE[0], "width": SIZE[1]}
    requests = [request_of(**size), request_of(image=IMAGE, strength=0.5), request_of(image=IMAGE, mask=MASK, count=2),
                request_of(guidance=1.0, seed=8, **size)]
    for together, request in zip(ours(requests), requests, strict=True):
        np.testing.assert_allclose(together.latents, one(request).latents, atol=1e-4)


def test_files_arrays_and_requests_that_are_repeated(made, tmp_path):
    _, ours = made("sd1")
    IMAGE.save(tmp_path / "image.png")
    of_file = request_of(image=str(tmp_path / "image.png"), strength=0.5, steps=4)
    first = ours(of_file)
    assert first.request.height == SIZE[0]
    again = ours(Request.from_json(first.request_of(0).to_json()))
    by_hand = ours(dataclasses.replace(of_file, image=np.asarray(IMAGE)))
    for other in (again, by_hand):
        np.testing.assert_array_equal(first.latents, other.latents)
    with pytest.raises(ValueError, match="its image were given by hand"):
        Request.from_json(by_hand.request.to_json())


def test_command_line(made, tmp_path, capsys):
    """A picture to latents, and latents to a picture; the refiner goes on with what the base model began."""
    IMAGE.save(tmp_path / "image.png")
    engine = ["--backend", "onnxruntime", "--dtype", "fp32", "--quiet", "--steps", "4", "--seed", "3"]

    def run(name: str, *options: str) -> int:
        return main([str(made(name)[1].bundle.path), PROMPT, "--negative", NEGATIVE, *engine, *options])

    noise, picture, refined = (str(tmp_path / name) for name in ("noise.npy", "picture.png", "refined.png"))
    assert run("sd1", "--image", str(tmp_path / "image.png"), "--task", "invert", "--guidance", "1", "-o", noise) == 0
    assert run("sd1", "--latents", noise, "--guidance", "1", "--size", "64x128", "-o", picture) == 0
    found = made("sd1")[1](request_of(image=IMAGE, task="invert", guidance=1.0, steps=4, output="latent")).latents
    np.testing.assert_array_equal(np.load(noise), found)
    two = made("sd1")[1](request_of(image=np.concatenate([found, found]), count=2, steps=4, strength=0.5))
    np.testing.assert_array_equal(made("sd1")[1](two.request_of(1)).latents[0], two.latents[1])
    redrawn = made("sd1")[1](request_of(latents=found, guidance=1.0, steps=4, height=SIZE[0], width=SIZE[1])).images[0]
    assert np.array_equal(np.asarray(Image.open(picture)), np.asarray(redrawn))
    assert run("sd1", "--latents", str(tmp_path / "image.png"), "-o", noise, "--force") == 2
    assert "image.png: not latents that can be read" in capsys.readouterr().err
    assert run("sdxl", "--size", "64x128", "--denoising-end", "0.5", "--refiner", str(made("refiner")[1].bundle.path),
               "-o", refined) == 0
    half = made("sdxl")[1](request_of(steps=4, height=SIZE[0], width=SIZE[1], denoising_end=0.5, output="latent"))
    whole = made("refiner")[1](request_of(steps=4, image=half.latents, denoising_start=0.5)).images[0]
    assert np.array_equal(np.asarray(Image.open(refined)), np.asarray(whole))


def test_a_safety_checker_sees_every_picture(made):
    _, ours = made("sd1")
    seen = []

    def check(image):
        seen.append(image)
        return None if len(seen) == 2 else image

    checked = Pipeline.load(ours.bundle.path, "onnxruntime", size=SIZE, progress=False, safety_checker=check)
    result = checked(request_of(steps=1, count=3))
    assert result.withheld == (1,) and result.images[0] is seen[0] and not np.asarray(result.images[1]).any()


@pytest.mark.parametrize(("name", "options", "message"), [
    ("sd1", {"mask": MASK}, "image: got none, expected one, for this model does inpaint"),
    ("sd1", {"depth": DEPTH}, "depth: got one, but text-to-image takes none; .* use a model that does depth-to-image"),
    ("sd1", {"strength": 0.5}, "strength: got 0.5, which text-to-image"),
    ("sd1", {"noise_level": 3}, "noise_level: got 3"),
    ("sd1", {"image": IMAGE, "blend": "next"}, "blend, paste: got them for image-to-image"),
    ("sd1", {"image": IMAGE, "strength": 0.01, "scheduler": "ddim"}, "none is left"),
    ("sd1", {"original_size": (8, 8)}, "original_size: got"),
    ("inpainting", {"image": IMAGE}, "mask: got none, expected one, for this model does inpaint"),
    ("inpainting", {"image": IMAGE, "mask": MASK, "blend": "next"}, "takes the mask itself"),
    ("depth", {"image": IMAGE}, "depth: got none"),
    ("depth", {"image": IMAGE, "depth": np.ones((4, 4))}, "depth: got 1 everywhere"),
    ("upscaler", {"image": IMAGE, "noise_level": 400}, "noise_level: got 400, expected at most 350"),
    ("refiner", {}, "image: got none, expected one, for this model does"),
    ("sd1", {"encoding": "mean"}, "encoding: got 'mean', which text-to-image"),
    ("sd1", {"denoising_start": 0.5}, "denoising_start: got 0.5"),
    ("sd1", {"crop": (0, 0)}, "crop: got"),
    ("sdxl", {"aesthetic_score": 7.0}, "aesthetic_score: got 7.0"),
    ("refiner", {"image": IMAGE, "target_size": (8, 8)}, "target_size: got"),
    ("sd1", {"image": IMAGE, "task": "invert"}, "output: got 'image' for a picture to invert"),
    ("sd1", {"image": IMAGE, "task": "invert", "output": "latent", "scheduler": "euler"}, "scheduler: got 'euler'"),
    ("sd1", {"image": np.zeros((4, 8, 16), np.float32), "mask": MASK, "paste": True}, "paste: got latents"),
    ("sd1", {"task": "upscale"}, "task: got 'upscale', expected one of .* use a model that does upscale"),
    ("sd1", {"task": "inpaint", "image": IMAGE}, "mask: got none"),
    ("sd1", {"task": "draw"}, "task: got 'draw', expected one of text-to-image"),
    ("sd1", {"image": "nothing.png"}, "image: nothing.png is not a picture"),
])
def test_what_a_model_does_not_do_is_refused(made, name, options, message):
    _, ours = made(name)
    with pytest.raises(ValueError, match=message):
        ours(request_of(**options))


def test_bundles_say_what_they_do(made):
    tasks = {name: made(name)[1].bundle.manifest.tasks
             for name in ("sd1", "inpainting_2", "depth", "upscaler", "sdxl", "refiner")}
    base = ("text-to-image", "image-to-image", "inpaint", "invert", "video")
    assert tasks == {"sd1": base, "inpainting_2": ("inpaint",), "depth": ("depth-to-image",), "upscaler": ("upscale",),
                     "sdxl": base, "refiner": base[1:]}
