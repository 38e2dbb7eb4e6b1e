"""Pictures with ControlNets are those of diffusers' pipelines, in every task, alone and in a batch."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers import ControlNetModel
from PIL import Image

import engines
from engines import Bundle
from engines.bundle import write_manifest
from export.attach import attach
from models import tiny
from runtime import Control, Pipeline, Request
from runtime.__main__ import main
from runtime.pictures.hints import canny
from runtime.pictures.save import metadata
from tests.tolerances import BATCH_IMAGE_MAX
from tests.tools.drawn import IMAGE, MASK, SIZE, assert_same, drawn_by, picture, request_of

HINT, OTHER = picture(*SIZE, seed=1), picture(40, 90, seed=2)


@pytest.fixture(scope="module")
def path(controlled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ControlNets: the second is the first under another name."""
    path = shutil.copytree(controlled, tmp_path_factory.mktemp("nets") / "bundle")
    manifest = Bundle.open(path).manifest
    again = {name.replace("edge-net", "soft"): dataclasses.replace(one, network="control_soft", label="soft")
             for name, one in manifest.components.items() if one.label == "edge-net"}
    write_manifest(path, dataclasses.replace(manifest, components={**manifest.components, **again}))
    return path


@pytest.fixture(scope="module")
def ours(path: Path) -> Pipeline:
    return Pipeline.load(path, "onnxruntime", size=SIZE, progress=False)


@pytest.fixture
def reference(checkpoints: Any, edge_net: Path) -> Any:
    def make(kind: str, scheduler: str = "DDIMScheduler", nets: int = 1) -> Any:
        net = ControlNetModel.from_pretrained(edge_net)
        given = net if nets == 1 else [net] * nets
        pipe = getattr(diffusers, kind).from_pretrained(checkpoints["sd1"], controlnet=given)
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def edge(**options: Any) -> Control:
    return Control(**{"name": "edge-net", "image": HINT, **options})


@pytest.mark.parametrize("options, control", [
    ({}, {}), ({"guidance": 1.0}, {"scale": 0.5}), ({"count": 2, "scheduler": "pndm"}, {"start": 0.2, "end": 0.7}),
    ({"scheduler": "heun"}, {"end": 0.4}),
], ids=["plain", "unguided", "pndm-part", "heun-part"])
def test_text_to_image(ours, reference, options, control):
    request = request_of(**{"scheduler": "ddim", **options}, control=edge(**control))
    kind = {"ddim": "DDIMScheduler", "pndm": "PNDMScheduler", "heun": "HeunDiscreteScheduler"}[str(request.scheduler)]
    one, = request.control
    expected = drawn_by(reference("StableDiffusionControlNetPipeline", kind), request, image=[HINT] * request.count,
                        height=SIZE[0], width=SIZE[1], controlnet_conditioning_scale=one.scale,
                        control_guidance_start=one.start, control_guidance_end=one.end)
    assert_same(ours, request, expected)
    bare = ours(dataclasses.replace(request, control=())).latents
    assert np.abs(bare - ours(request).latents).max() > 0.05, "the ControlNet does nothing here"


def test_two_nets_of_other_sizes_and_steps(ours, reference):
    """Their residuals add up; a hint of another size is resized."""
    control = [edge(scale=0.7, end=0.5), edge(name="soft", image=OTHER, start=0.3)]
    request = request_of(scheduler="ddim", control=control)
    expected = drawn_by(reference("StableDiffusionControlNetPipeline", nets=2), request, image=[HINT, OTHER],
                        height=SIZE[0], width=SIZE[1], controlnet_conditioning_scale=[0.7, 1.0],
                        control_guidance_start=[0.0, 0.3], control_guidance_end=[0.5, 1.0])
    assert_same(ours, request, expected)


def test_image_to_image(ours, reference):
    request = request_of(scheduler="ddim", image=IMAGE, strength=0.6, control=edge(scale=0.5, start=0.3))
    expected = drawn_by(reference("StableDiffusionControlNetImg2ImgPipeline"), request, image=IMAGE, control_image=HINT,
                        strength=0.6, controlnet_conditioning_scale=0.5, control_guidance_start=0.3)
    assert_same(ours, request, expected)


def test_inpainting(ours, reference):
    request = request_of(scheduler="ddim", image=IMAGE, mask=MASK, strength=0.8, blend="next", control=edge())
    expected = drawn_by(reference("StableDiffusionControlNetInpaintPipeline"), request, image=IMAGE, mask_image=MASK,
                        control_image=HINT, strength=0.8, height=SIZE[0], width=SIZE[1],
                        controlnet_conditioning_scale=1.0)
    assert_same(ours, request, expected)


def test_stable_diffusion_xl(checkpoints, bundles, tmp_path):
    """A net of its own, which is told the pooled text and the sizes too; unguided as well."""
    net = tiny.control(tmp_path / "net", checkpoints["sdxl"])
    path = shutil.copytree(bundles["sdxl"], tmp_path / "xl", ignore=shutil.ignore_patterns("engines"))
    attach(net, path, progress=False)
    ours = Pipeline.load(path, "onnxruntime", size=SIZE, progress=False)
    pipe = diffusers.StableDiffusionXLControlNetPipeline.from_pretrained(
        checkpoints["sdxl"], controlnet=ControlNetModel.from_pretrained(net))
    pipe.set_progress_bar_config(disable=True)
    for guidance in (7.5, 1.0):
        request = request_of(guidance=guidance, original_size=(48, 96), crop=(4, 8), height=SIZE[0], width=SIZE[1],
                             control=Control("net", HINT, scale=0.6, end=0.7))
        expected = drawn_by(pipe, request, image=HINT, height=SIZE[0], width=SIZE[1], original_size=(48, 96),
                            crops_coords_top_left=(4, 8), controlnet_conditioning_scale=0.6, control_guidance_end=0.7)
        assert_same(ours, request, expected)
        bare = ours(dataclasses.replace(request, control=())).latents
        assert np.abs(bare - ours(request).latents).max() > 0.05, "the ControlNet does nothing here"


def test_edges_are_made_of_a_picture(ours):
    """Of the size that is drawn, whatever that of the picture is."""
    pytest.importorskip("cv2", reason="needs opencv-python-headless")
    large = picture(2 * SIZE[0], 2 * SIZE[1], seed=1)
    edges = canny(large.resize(SIZE[::-1], Image.Resampling.LANCZOS))
    assert 0.01 < (np.asarray(edges) > 0).mean() < 0.5
    made, given = (ours(request_of(steps=2, control=edge(**options))).latents
                   for options in ({"image": large, "preprocessor": "canny"}, {"image": edges}))
    np.testing.assert_array_equal(made, given)


def test_command_line(path, tmp_path, capsys):
    """And the picture repeats itself, with the hint from its file."""
    HINT.save(tmp_path / "hint.png")
    engine = ["--backend", "onnxruntime", "--dtype", "fp32", "--quiet"]
    asked = ["--steps", "2", "--seed", "1", "--size", "64x128", "--control",
             f"edge-net={tmp_path / 'hint.png'}:0.5,end=0.5"]
    assert main([str(path), "a cat", *engine, *asked, "-o", str(tmp_path / "a.png")]) == 0
    assert main([str(path), *engine, "--from", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png")]) == 0
    stored = metadata(tmp_path / "b.png")["request"]["control"]
    assert stored == [{"name": "edge-net", "image": str(tmp_path / "hint.png"), "scale": 0.5, "start": 0.0, "end": 0.5,
                       "preprocessor": None}]
    assert np.array_equal(*(np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "ab"))
    for wrong in ("edge-net", "edge-net=", "edge-net=a.png,from=0.5", "edge-net=a.png:half", "edge-net=a.png,end=2"):
        with pytest.raises(SystemExit):
            main([str(path), "a cat", "--control", wrong])
        assert "argument --control: control" in capsys.readouterr().err


def mixed() -> list[Request]:
    """With and without a net, guided and not, one that is used in a few steps only, and two."""
    return [request_of(steps=4, control=edge()), request_of(steps=3, seed=4),
            request_of(steps=5, seed=5, guidance=1.0, control=edge(name="soft", image=OTHER, scale=0.4)),
            request_of(steps=6, seed=6, control=edge(start=0.4, end=0.7)),
            request_of(steps=3, seed=7, control=[edge(scale=0.3), edge(name="soft", image=OTHER)])]


@pytest.mark.parametrize("parts", [True, False], ids=["parts", "whole"])
def test_a_batch_is_each_alone(ours, path, parts, monkeypatch):
    """Where one image uses a net and its neighbour does not, the neighbour's is as if there were none."""
    monkeypatch.setattr(engines.backend("onnxruntime"), "in_parts", parts)
    batch = Pipeline.load(path, "onnxruntime", size=SIZE, batch=2, progress=False)
    for together, request in zip(batch(mixed()), mixed(), strict=True):
        got, alone = (ours.decode(result.latents) for result in (together, ours(request)))
        np.testing.assert_allclose(got, alone, atol=BATCH_IMAGE_MAX, rtol=0)


def test_what_is_not_attached_is_refused(ours):
    with pytest.raises(ValueError, match=r"control: got 'depth', expected one that is attached \(edge-net, soft\); "
                                         "attach it with: python -m export CONTROLNET --into .* --as depth"):
        ours(request_of(control=edge(name="depth")))
    with pytest.raises(ValueError, match=r"control: nothing\.png is not a picture"):
        ours(request_of(control=edge(image="nothing.png")))


@pytest.mark.parametrize("given, message", [
    (lambda: edge(scale=float("nan")), "control scale: got nan"), (lambda: edge(start=1.5), "control start: got 1.5"),
    (lambda: edge(start=0.5, end=0.5), "got start 0.5 and end 0.5"), (lambda: edge(name="a b"), "got the name 'a b'"),
    (lambda: edge(image=None), "got no image for edge-net"),
    (lambda: edge(preprocessor="hed"), "control preprocessor: got 'hed', expected one of canny"),
    (lambda: [edge(), edge()], "got edge-net twice"),
    (lambda: HINT, "got Image, expected a Control"), (lambda: ["edge-net"], "got a str in the list"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Request("", control=given())


def test_a_request_is_stored_with_its_nets(tmp_path):
    """Of a hint its file; one given by hand is not stored, which repeating it says."""
    HINT.save(tmp_path / "hint.png")
    request = Request("a cat", control=edge(image=tmp_path / "hint.png", scale=0.5, end=0.8))
    again = Request.from_json(json.loads(json.dumps(request.to_json())))
    assert again == request and again.control[0].image == str(tmp_path / "hint.png")
    assert "control" not in Request("a cat").to_json()
    with pytest.raises(ValueError, match="its control edge-net were given by hand, which are not stored"):
        Request.from_json(Request("a cat", control=edge()).to_json())


@pytest.mark.parametrize("steps, start, end", [(1, 0.0, 1.0), (6, 0.2, 0.7), (7, 0.0, 0.4), (50, 0.31, 1.0)])
def test_steps_that_a_net_is_used_in(steps, start, end):
    keep = [1.0 - float(i / steps < start or (i + 1) / steps > end) for i in range(steps)]  # as diffusers has it
    np.testing.assert_allclose(edge(scale=0.5, start=start, end=end).scales(steps), 0.5 * np.array(keep))
