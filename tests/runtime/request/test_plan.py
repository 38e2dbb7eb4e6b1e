"""Plans: the task, the size and the pictures of a request, and what a model refuses, before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime import Control, Request
from runtime.pictures import read, video
from runtime.request.option import options_of
from runtime.request.plan import Plan, plan
from runtime.request.request import TASKS
from runtime.request.task import NEEDS, blank
from tests.tools.manifests import KINDS, bundle_of

IMAGE = Image.new("RGB", (150, 70), "red")  # of 150x70 pixels, 128x64 are drawn
MASK = Image.new("L", (20, 10), 255)
DEPTH = np.arange(6.0).reshape(2, 3)
FRAMES = [Image.new("RGB", (150, 70), (40 * n, 0, 0)) for n in range(5)]
LATENTS = np.zeros((4, 8, 16), np.float32)
SIZE = (64, 192)
PICTURES: dict[str, Any] = {"image": IMAGE, "mask": MASK, "depth": DEPTH, "frames": FRAMES}


def planned(kind: str, **options: Any) -> Plan:
    return plan(Request(**{"prompt": "", **options}), bundle_of(kind), SIZE)


@pytest.mark.parametrize(("kind", "options", "task", "size", "strength"), [
    ("sd", {}, "text-to-image", SIZE, None),
    ("sd", {"height": 128}, "text-to-image", (128, 192), None),
    ("sd", {"image": IMAGE}, "image-to-image", (64, 128), 0.8),
    ("sd", {"image": LATENTS}, "image-to-image", (64, 128), 0.8),
    ("sd", {"image": IMAGE, "width": 64, "strength": 0.5}, "image-to-image", (64, 64), 0.5),
    ("sd", {"image": IMAGE, "mask": MASK}, "inpaint", (64, 128), 0.8),
    ("sd", {"image": IMAGE, "mask": MASK, "blend": "next"}, "inpaint", (64, 128), 1.0),
    ("sd", {"image": IMAGE, "task": "invert", "output": "latent"}, "invert", (64, 128), None),
    ("sd", {"frames": FRAMES}, "video", (64, 128), 0.8),
    ("inpainting", {"image": IMAGE, "mask": MASK}, "inpaint", (64, 128), 1.0),
    ("depth", {"image": IMAGE, "depth": DEPTH}, "depth-to-image", (64, 128), 0.8),
    ("upscaler", {"image": IMAGE}, "upscale", (512, 1152), None),
    ("xl", {}, "text-to-image", SIZE, None), ("xl", {"image": IMAGE}, "image-to-image", (64, 128), 0.3),
    ("refiner", {"image": IMAGE}, "image-to-image", (64, 128), 0.3),
])
def test_task_size_and_defaults(kind, options, task, size, strength):
    found = planned(kind, **options)
    request = found.request
    assert (found.task, found.size, request.strength) == (task, size, strength)
    assert (request.height, request.width) == size and request.seed == found.seed < 2**32
    assert found.shape == (4, size[0] // 8, size[1] // 8) and found.factor == 8
    assert request.noise_level == (20 if task == "upscale" else None)
    share = 1.0 if strength is None else strength
    assert found.table.rows == int(50 * share)


def test_a_plan_of_a_plan_is_the_same():
    """The request that a picture stores is resolved already."""
    first = planned("sd", image=IMAGE)
    again = plan(first.request, bundle_of("sd"), (512, 512))
    assert again.request == first.request and again.size == first.size


@pytest.mark.parametrize("kind", KINDS)
def test_a_blank_request_is_one_that_the_model_honours(kind):
    bundle = bundle_of(kind)
    found = plan(blank(bundle.manifest, SIZE), bundle, (512, 512))
    assert found.task == bundle.manifest.tasks[0] and found.size == SIZE


OTHER: dict[str, Any] = {
    "scheduler": "euler", "eta": 0.5, "timesteps": (9, 5), "latents": LATENTS, "strength": 0.5, "blend": "next",
    "count": 2, "paste": True, "encoding": "mean", "noise_level": 3, "every": 2, "limit": 2, "original_size": (8, 8),
    "crop": (1, 1), "target_size": (8, 8), "aesthetic_score": 7.0, "negative_aesthetic_score": 1.0,
    "denoising_start": 0.5, "denoising_end": 0.5}
ONE_OF = {"text-to-image": "sd", "image-to-image": "sd", "inpaint": "sd", "depth-to-image": "depth",
          "upscale": "upscaler", "invert": "sd", "video": "sd"}
TOLD = {"xl": {"original_size", "crop", "target_size"},
        "refiner": {"original_size", "crop", "aesthetic_score", "negative_aesthetic_score"},
        "upscaler": {"noise_level"}}


def with_pictures(task: str, **options: Any) -> dict[str, Any]:
    needed = {name: PICTURES[name] for name, tasks in NEEDS.items() if task in tasks}
    output = "latent" if task == "invert" else "image"
    return {**needed, "task": task, "output": output, "height": 64, "width": 128, **options}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", OTHER)
def test_an_option_is_taken_or_refused_as_it_is_declared(task, name):
    """Of the first model that does the task; an option that is not declared for a task is refused there by name."""
    kind, declared = ONE_OF[task], options_of(Request)[name]
    request = with_pictures(task, **{name: OTHER[name]})
    if name == "timesteps" and task != "invert":
        request["scheduler"] = "euler"
    if declared.fits(task, OTHER[name]) and (not declared.condition or name in TOLD.get(kind, ())):
        assert name in vars(planned(kind, **request).request)
    else:
        with pytest.raises(ValueError, match=f"{name}.*: got .*leave (it|them) out|count: got 2 for a video"):
            planned(kind, **request)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(set().union(*TOLD.values()) - {"noise_level"}))
def test_numbers_are_for_models_that_are_told_them(kind, name):
    task = bundle_of(kind).manifest.tasks[0]
    options = with_pictures(task, **{name: OTHER[name]})
    if name in TOLD.get(kind, ()):
        assert vars(planned(kind, **options).request)[name] == OTHER[name]
    else:
        with pytest.raises(ValueError, match=rf"{name}: got .*, which {task} with this {kind} model does not have"):
            planned(kind, **options)


@pytest.mark.parametrize(("kind", "options", "message"), [
    ("sd", {"task": "upscale", "image": IMAGE}, "task: got 'upscale', expected one of text-to-image"),
    ("sd", {"mask": MASK}, "image: got none, expected one, for this model does inpaint; pass image="),
    ("sd", {"depth": DEPTH}, "depth: got one, but text-to-image takes none; .* a model that does depth-to-image"),
    ("xl", {"frames": FRAMES}, "frames: got a video, expected none: this xl model does text-to-image"),
    ("inpainting", {"image": LATENTS, "mask": MASK}, r"image: got an array of shape \(4, 8, 16\)"),
    ("inpainting", {"image": IMAGE, "mask": MASK, "blend": "next"}, "takes the mask itself"),
    ("sd", {"image": LATENTS, "mask": MASK, "paste": True}, "paste: got latents"),
    ("sd", {"image": LATENTS, "width": 64}, r"image: got latents of shape \(4, 8, 16\), expected \(4, 8, 8\)"),
    ("sd", {"latents": LATENTS}, r"latents: got \(4, 8, 16\) an image, expected \(4, 8, 24\) for 64x192"),
    ("sd", {"height": 100}, "expected multiples of 64 pixels"),
    ("sd", {"image": "nothing.png"}, "image: nothing.png is not a picture"),
    ("sd", {"image": IMAGE, "mask": "nothing.png"}, "mask: nothing.png is not a picture"),
    ("depth", {"image": IMAGE, "depth": np.ones((2, 2))}, "depth: got 1 everywhere"),
    ("upscaler", {"image": IMAGE, "noise_level": 400}, "noise_level: got 400, expected at most 350"),
    ("sd", {"control": Control("depth", IMAGE)}, r"control: got 'depth', expected one that is attached \(canny\).*"
                                                 r"--into sd\.bundle --as depth"),
    ("sd", {"control": Control("canny", "nothing.png")}, "control: nothing.png is not a picture"),
    ("sd", {"frames": FRAMES, "control": Control("canny", FRAMES[:3])}, "control canny: got 3 hints for 5 frames"),
    ("sd", {"image": IMAGE, "strength": 0.01}, "none is left"),
])
def test_everything_that_a_model_cannot_do_is_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        planned(kind, **options)


def test_only_requests_are_planned():
    with pytest.raises(ValueError, match="request: got str, expected a Request"):
        plan("a cat", bundle_of("sd"), SIZE)


def test_a_depth_estimator_sees_the_picture_that_is_read(tmp_path, reads):
    IMAGE.save(tmp_path / "a.png")
    seen = []

    def estimate(image: Image.Image) -> np.ndarray:
        seen.append(image)
        return DEPTH

    found = plan(Request("", image=tmp_path / "a.png"), bundle_of("depth"), SIZE, estimate)
    assert seen == [found.image] and found.depth is not None and found.depth.shape == (1, 8, 16)
    assert reads == [str(tmp_path / "a.png")]
    plan(found.request, bundle_of("depth"), SIZE, estimate)
    assert len(seen) == 1, "the request has its depth now"


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The files that are read, in turn."""
    files: list[str] = []
    one, many = read.read, video.read

    def read_picture(value: Any, name: str) -> Image.Image:
        if isinstance(value, (str, Path)):
            files.append(str(value))
        return one(value, name)

    def read_video(value: Any, *more: Any, **options: Any) -> video.Clip:
        files.append(str(value))
        return many(value, *more, **options)

    monkeypatch.setattr(read, "read", read_picture)
    monkeypatch.setattr(video, "read", read_video)
    return files


def test_each_file_is_read_once(tmp_path, reads):
    for name in ("image", "mask", "hint"):
        IMAGE.save(tmp_path / f"{name}.png")
    image, mask, hint = (tmp_path / f"{name}.png" for name in ("image", "mask", "hint"))
    found = planned("sd", image=image, mask=mask, control=Control("canny", hint))
    assert sorted(reads) == sorted(map(str, (image, mask, hint)))
    assert [one.size for one in (found.image, found.mask, *found.hints[0])] == [IMAGE.size] * 3
    reads.clear()
    planned("sd", image=str(image), control=Control("canny", image, preprocessor="canny"))
    assert reads == [str(image)], "one picture for two things is read once too"


def test_a_video_is_read_once_with_its_rate(tmp_path, reads):
    video.write(FRAMES, tmp_path / "a.gif", 10)
    found = planned("sd", frames=tmp_path / "a.gif", every=2, control=Control("canny", str(tmp_path / "a.gif")))
    assert reads == [str(tmp_path / "a.gif")]
    assert found.count == len(found.hints[0]) == 3 and found.rate == pytest.approx(5) and found.names == ()
    still = planned("sd", frames=FRAMES, control=Control("canny", IMAGE))
    assert [len(hints) for hints in still.hints] == [1]
