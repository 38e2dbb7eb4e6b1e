"""Every task on another engine, in one batch, from files and the command line; what a model does not do is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from runtime import Pipeline, Request
from runtime.__main__ import main
from tests.tools.drawn import DEPTH, IMAGE, MASK, NEGATIVE, PROMPT, SIZE, picture, request_of

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
