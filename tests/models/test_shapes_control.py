"""The ControlNet and the LoRA that ship: they load like any other, and do to the model's pictures what they are for."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from models.training.adapters.style import draw_in_style
from models.world import drawing, placed, scenes
from models.world.adherence import check
from models.world.captions import parse
from models.world.layouts import held_out, sample_layout
from models.world.steering import in_place, in_style, overlap
from runtime import Control, Lora, Pipeline, Request
from tests.conftest import SHAPES, Lazy

NET = SHAPES.with_name("shapes-edges")
LORA = SHAPES.with_name("shapes-red-chalk") / "pytorch_lora_weights.safetensors"
CAPTIONS = 6


def ask(caption: str, seed: int) -> Request:
    return Request(caption, seed=seed, steps=10, guidance=2.0, scheduler="ddim")


def draw(pipe: Pipeline, requests: list[Request]) -> list[np.ndarray]:
    return [np.asarray(result.images[0]) for result in pipe(requests)]


@pytest.fixture(scope="module")
def pipe(bundles: Lazy, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """The model that ships with its ControlNet as "edges"."""
    from export.attach import attach

    path = tmp_path_factory.mktemp("shapes") / "bundle"
    shutil.copytree(bundles["shapes"], path, ignore=shutil.ignore_patterns("engines"))
    attach(NET, path, "edges", progress=False)
    return Pipeline.load(path, "onnxruntime", batch=CAPTIONS, progress=False)


def test_the_controlnet_puts_objects_where_the_hint_has_them(pipe: Pipeline) -> None:
    pytest.importorskip("cv2", reason="needs opencv-python-headless")
    asked = placed.held_out(CAPTIONS)
    drawn = drawing.draw([layout for layout, _ in asked])
    plain = [ask(told.caption, i) for i, (_, told) in enumerate(asked)]
    hints = [Image.fromarray(hint).convert("RGB") for hint in placed.edges(drawn)]
    without = draw(pipe, plain)
    steered = draw(pipe, [replace(r, control=(Control("edges", h),)) for r, h in zip(plain, hints, strict=True)])
    overlaps = [[overlap(image, scene) for image, scene in zip(images, drawn, strict=True)]
                for images in (without, steered)]
    assert np.mean(overlaps[1]) > 0.8 and np.mean(overlaps[1]) > np.mean(overlaps[0]) + 0.4, overlaps
    stand = [in_place(image, *one) for image, one in zip(steered, asked, strict=True)]
    assert sum(stand) >= CAPTIONS // 2 and not any(map(in_place, without, *zip(*asked, strict=True))), stand


def test_the_lora_draws_red_on_white_and_at_scale_0_nothing_changes(pipe: Pipeline) -> None:
    told = held_out(CAPTIONS)
    plain = [ask(scene.caption, i) for i, scene in enumerate(told)]
    without, off, on = (draw(pipe, [replace(request, loras=loras) for request in plain])
                        for loras in ((), (Lora(str(LORA), 0.0),), (Lora(str(LORA)),)))
    np.testing.assert_array_equal(off, without)
    assert not any(map(in_style, without)) and sum(map(in_style, on)) >= CAPTIONS - 1
    shown = [check(image, scene, colours=False).ok for image, scene in zip(on, told, strict=True)]
    assert sum(shown) >= CAPTIONS * 3 // 4, shown


def test_both_are_small() -> None:
    for file, most in ((NET / "diffusion_pytorch_model.safetensors", 4e6), (LORA, 1e6)):
        assert file.stat().st_size < most


# --- what the figures rest on


def layouts(count: int) -> list[scenes.Layout]:
    return [layout for layout, _ in placed.held_out(count, seed=3)]


def test_what_was_drawn_is_in_place_and_what_was_moved_or_painted_otherwise_is_not() -> None:
    pytest.importorskip("cv2", reason="needs opencv-python-headless")
    for layout, image in zip(layouts(40), drawing.draw(layouts(40)), strict=True):
        assert in_place(image, layout) and overlap(image, image) == 1
        moved = np.roll(image, 4, axis=1)
        assert not in_place(moved, layout) and overlap(moved, image) < 0.75
        first = layout.scene.objects[0]
        other = next(c for c in scenes.COLOURS if c not in {o.colour for o in layout.scene.objects})
        objects = (replace(first, colour=other), *layout.scene.objects[1:])
        painted = drawing.draw([replace(layout, scene=replace(layout.scene, objects=objects))])[0]
        assert not in_place(painted, layout) and overlap(painted, image) > 0.9


def test_red_on_white_is_the_style_and_nothing_else_is() -> None:
    some = layouts(40)
    for layout, styled, image in zip(some, draw_in_style(some), drawing.draw(some), strict=True):
        assert in_style(styled) and check(styled, layout.scene, colours=False).ok
        assert not in_style(image) and not check(styled, layout.scene).ok
        assert not in_style(np.full_like(styled, 245)) and not in_style(styled[..., ::-1].copy())


def test_a_caption_beside_a_hint_keeps_to_the_held_out_split() -> None:
    from random import Random

    rng = Random(6)
    texts = [placed.training_caption(sample_layout(rng).scene, rng) for _ in range(2000)]
    assert 0.07 < texts.count("") / len(texts) < 0.14
    assert not any(parse(text).held_out for text in texts if text)
    assert all(told.held_out and parse(told.caption).held_out for _, told in placed.held_out(64))
