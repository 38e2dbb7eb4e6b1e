"""The scenes: captions say what was drawn, drawings keep their distances, and the held-out split holds."""

from itertools import product
from random import Random

import numpy as np
import pytest

from models.world.captions import WORDS, caption, describe, parse, training_caption
from models.world.drawing import draw
from models.world.layouts import held_out, place, sample_layout
from models.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    RADII,
    RELATIONS,
    SHAPES,
    UNSEEN_PAIRS,
    Layout,
    Object,
    Scene,
)


def test_a_caption_reads_back_as_the_scene_it_describes() -> None:
    rng = Random(1)
    for _ in range(2000):
        told = describe(sample_layout(rng).scene, rng)
        assert parse(told.caption) == told


def test_captions_fit_the_text_encoder_and_use_only_its_words() -> None:
    rng = Random(2)
    longest = 0
    for _ in range(5000):
        words = describe(sample_layout(rng).scene, rng).caption.replace(",", " ,").split()
        assert set(words) <= set(WORDS)
        longest = max(longest, len(words))
    assert longest == 30  # and two tokens for start and end


def test_every_wording_of_a_relation_is_reached_and_read() -> None:
    objects = (Object("circle", "red", "large"), Object("star", "green"))
    for relation in RELATIONS:
        scene = Scene(objects, (relation,))
        texts = {caption(scene, Random(i)) for i in range(200)}
        assert len(texts) >= 8
        assert {parse(t).relations for t in texts} == {(relation,)}


def test_a_word_outside_the_grammar_is_named() -> None:
    with pytest.raises(ValueError, match="hexagon"):
        parse("a red hexagon")


def test_the_world_is_as_large_as_promised() -> None:
    assert len(SHAPES) >= 6 and len(COLOURS) >= 8 and len(BACKGROUNDS) >= 4
    assert {s for s, _ in UNSEEN_PAIRS} == set(SHAPES)
    assert len({c for _, c in UNSEEN_PAIRS}) == len(UNSEEN_PAIRS)


def test_training_never_meets_an_unseen_pair() -> None:
    rng = Random(3)
    pairs = {(o.shape, o.colour) for _ in range(3000) for o in sample_layout(rng).scene.objects}
    assert pairs == {(s, c) for s in SHAPES for c in COLOURS} - UNSEEN_PAIRS


def test_training_never_meets_a_held_out_caption() -> None:
    rng = Random(4)
    texts = [training_caption(sample_layout(rng).scene, rng) for _ in range(5000)]
    assert texts.count("") < 5
    assert not any(parse(t).held_out for t in texts if t)


def test_held_out_captions_are_held_out_in_every_wording() -> None:
    scenes = held_out(256)
    assert len({s.caption for s in scenes}) == 256
    assert 0.25 <= np.mean([s.unseen for s in scenes]) <= 0.34
    assert scenes == held_out(256) and scenes != held_out(256, seed=1)
    for scene in scenes:
        assert scene.held_out and scene.reversed().held_out and parse(caption(scene, Random(5))).held_out


def test_the_seen_half_of_the_held_out_captions_holds_only_seen_pairs() -> None:
    seen = [s for s in held_out(256) if not s.unseen]
    assert all((o.shape, o.colour) not in UNSEEN_PAIRS for s in seen for o in s.objects)


def test_reversing_twice_changes_nothing() -> None:
    rng = Random(6)
    for _ in range(100):
        scene = sample_layout(rng).scene
        assert scene.reversed().reversed() == scene


@pytest.mark.parametrize("relation", RELATIONS)
def test_objects_stand_where_the_relation_says(relation: str) -> None:
    scene = Scene((Object("circle", "red"), Object("star", "green")), (relation,), "black")
    for i in range(50):
        layout = place(scene, Random(i))
        assert layout is not None
        (ax, ay), (bx, by) = layout.centres
        holds = {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}
        assert holds[relation]
        assert np.hypot(ax - bx, ay - by) > sum(layout.radii) + 2


@pytest.mark.parametrize("second", RELATIONS)
@pytest.mark.parametrize("first", RELATIONS)
def test_three_objects_fit_in_every_chain_and_size(first: str, second: str) -> None:
    for sizes in product(RADII, repeat=3):
        objects = tuple(Object("circle", c, s) for c, s in zip(("red", "green", "blue"), sizes, strict=True))
        layouts = [place(Scene(objects, (first, second), "black"), Random(i)) for i in range(10)]
        for layout in layouts:
            assert layout is not None
            image = draw([layout])[0]
            frame = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
            assert (frame == BACKGROUNDS["black"]).all()
        assert len({layout.centres for layout in layouts if layout}) > 1


def test_objects_stand_on_the_grid_of_the_latents() -> None:
    rng = Random(8)
    centres = [c for _ in range(500) for c in sample_layout(rng).centres]
    assert all(x % 4 == 0 and y % 4 == 0 for x, y in centres)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_drawn_in_its_colour_around_its_centre(shape: str) -> None:
    scene = Scene((Object(shape, "red"),), (), "black")
    image = draw([Layout(scene, (9.5,), ((20.5, 40.5),))])[0]
    assert tuple(image[40, 20]) == COLOURS["red"]
    assert tuple(image[2, 2]) == BACKGROUNDS["black"]
    cover = image[..., 0].astype(float) - BACKGROUNDS["black"][0]
    grid = np.arange(IMAGE_SIZE) + 0.5
    assert (cover.sum(0) * grid).sum() / cover.sum() == pytest.approx(20.5, abs=0.15)
    assert (cover.sum(1) * grid).sum() / cover.sum() == pytest.approx(40.5, abs=0.15)


def test_a_picture_does_not_depend_on_its_batch() -> None:
    rng = Random(7)
    layouts = [sample_layout(rng) for _ in range(20)]
    together = draw(layouts)
    assert all(np.array_equal(together[i], draw([v])[0]) for i, v in enumerate(layouts))


def test_an_impossible_scene_is_refused() -> None:
    with pytest.raises(ValueError, match="hexagon"):
        Object("hexagon", "red")
    with pytest.raises(ValueError, match="one shape and colour"):
        Scene((Object("circle", "red", "small"), Object("circle", "red", "large")), (None,))
    with pytest.raises(ValueError, match="relations"):
        Scene((Object("circle", "red"),), ("above",))
