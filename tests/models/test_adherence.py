"""The checker passes what was drawn and fails every single thing that can be wrong with a picture."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest

from models.world.adherence import check, find
from models.world.captions import describe
from models.world.drawing import draw
from models.world.layouts import sample_layout
from models.world.scenes import BACKGROUNDS, COLOURS, RADII, SHAPES, Layout, Object, Scene


def drawn(count: int, seed: int, objects: tuple[int, ...] = (1, 2, 3)) -> list[tuple[Layout, np.ndarray]]:
    rng = Random(seed)
    layouts: list[Layout] = []
    while len(layouts) < count:
        layout = sample_layout(rng, unseen=len(layouts) % 3 == 0)
        if len(layout.scene.objects) in objects:
            layouts.append(layout)
    return list(zip(layouts, draw(layouts), strict=True))


def another(names: object, name: str, rng: Random) -> str:
    return rng.choice([n for n in names if n != name])  # type: ignore[attr-defined]


def test_what_was_drawn_passes() -> None:
    rng = Random(0)
    for layout, image in drawn(500, 1):
        told = describe(layout.scene, rng)
        assert check(image, layout.scene).problems == []
        assert check(image, told).ok and check(image, told.reversed()).ok


@pytest.mark.parametrize("size", RADII)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_object_is_recognised_on_every_background(shape: str, size: str) -> None:
    rng = Random(2)
    scenes = [Scene((Object(shape, c, size),), (), b) for c in COLOURS for b in BACKGROUNDS]
    centres = [(rng.uniform(15, 49), rng.uniform(15, 49)) for _ in scenes]
    layouts = [Layout(s, (RADII[size] + rng.uniform(-0.4, 0.4),), (c,)) for s, c in zip(scenes, centres, strict=True)]
    for layout, image in zip(layouts, draw(layouts), strict=True):
        background, found = find(image)
        assert background == layout.scene.background
        assert [(f.shape, f.colour, f.size) for f in found] == [(shape, layout.scene.objects[0].colour, size)]
        assert found[0].radius == pytest.approx(layout.radii[0], abs=0.2)
        assert found[0].centre == pytest.approx(layout.centres[0], abs=0.2)


def test_a_little_noise_and_blur_do_no_harm() -> None:
    noise = np.random.default_rng(3)
    for layout, image in drawn(100, 3):
        soft = (image[:-1].astype(float) * 0.8 + image[1:] * 0.2).repeat([1] * 62 + [2], axis=0)
        noisy = np.clip(soft + noise.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
        assert check(noisy, layout.scene).problems == []


@pytest.mark.parametrize("field", ["shape", "colour", "size"])
def test_one_wrong_property_of_one_object_fails(field: str) -> None:
    rng = Random(4)
    names = {"shape": SHAPES, "colour": COLOURS, "size": RADII}[field]
    for layout, image in drawn(150, 4):
        objects = list(layout.scene.objects)
        i = rng.randrange(len(objects))
        objects[i] = replace(objects[i], **{field: another(names, getattr(objects[i], field), rng)})
        if len({(o.shape, o.colour) for o in objects}) < len(objects):
            continue
        verdict = check(image, replace(layout.scene, objects=tuple(objects)))
        assert not verdict.ok
        assert any(str(getattr(objects[i], field)) in p for p in verdict.problems)


def test_colours_swapped_between_two_objects_fail() -> None:
    for layout, image in drawn(100, 5, objects=(2,)):
        a, b = layout.scene.objects
        if a.colour != b.colour and a.shape != b.shape:
            swapped = replace(a, colour=b.colour), replace(b, colour=a.colour)
            assert not check(image, replace(layout.scene, objects=swapped)).ok


def test_a_relation_told_the_wrong_way_round_fails() -> None:
    for layout, image in drawn(100, 6, objects=(2, 3)):
        wrong = replace(layout.scene, relations=layout.scene.reversed().relations[::-1])
        assert wrong.relations != layout.scene.relations
        assert not check(image, wrong).ok


def test_a_missing_object_fails() -> None:
    for layout, _ in drawn(100, 7, objects=(2, 3)):
        fewer = replace(layout.scene, objects=layout.scene.objects[:-1], relations=layout.scene.relations[:-1])
        image = draw([Layout(fewer, layout.radii[:-1], layout.centres[:-1])])[0]
        assert not check(image, layout.scene).ok
        assert check(image, fewer).ok


def test_an_object_too_many_fails() -> None:
    for layout, image in drawn(100, 8, objects=(2, 3)):
        fewer = replace(layout.scene, objects=layout.scene.objects[:-1], relations=layout.scene.relations[:-1])
        verdict = check(image, fewer)
        assert not verdict.ok and "objects instead of" in verdict.problems[0]


def test_another_background_fails_only_where_one_is_named() -> None:
    rng = Random(9)
    for layout, image in drawn(100, 9):
        other = another(BACKGROUNDS, str(layout.scene.background), rng)
        assert not check(image, replace(layout.scene, background=other)).ok
        assert check(image, replace(layout.scene, background=None)).ok


def test_two_objects_grown_into_one_another_fail() -> None:
    scene = Scene((Object("circle", "red"), Object("square", "blue")), ("left of",), "white")
    image = draw([Layout(scene, (9.0, 9.0), ((24.0, 32.0), (36.0, 32.0)))])[0]
    assert not check(image, scene).ok


def test_an_object_in_two_colours_fails() -> None:
    scene = Scene((Object("square", "red", "large"),), (), "black")
    image = draw([Layout(scene, (9.5,), ((32.0, 32.0),))])[0]
    assert check(image, scene).ok
    half = image.copy()
    half[:, 36:][half[:, 36:, 0] > 200] = COLOURS["blue"]
    assert not check(half, scene).ok


@pytest.mark.parametrize("name", ["noise", "plain", "colour between two"])
def test_pictures_of_nothing_fail(name: str) -> None:
    scene = Scene((Object("circle", "red"),))
    image = np.full((64, 64, 3), BACKGROUNDS["grey"], np.uint8)
    if name == "noise":
        image = np.random.default_rng(0).integers(0, 256, image.shape, dtype=np.uint8)
    elif name == "colour between two":
        y, x = np.mgrid[:64, :64]
        image[np.hypot(x - 32, y - 32) < 9] = (190, 100, 150)
    assert not check(image, scene).ok


def test_a_picture_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        check(np.zeros((32, 32, 3), np.uint8), Scene((Object("circle", "red"),)))
