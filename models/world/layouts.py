"""Layouts: random scenes, and where in the picture their objects stand."""

from collections.abc import Sequence
from itertools import combinations
from random import Random

import numpy as np

from models.world.captions import describe
from models.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    RADII,
    RELATIONS,
    SHAPES,
    UNSEEN_PAIRS,
    Layout,
    Object,
    Scene,
)

_EXTENT = 1.2  # no shape reaches further than this many radii from its centre
_GAP = 1.0  # pixels between the extents of two objects


def sample_layout(rng: Random, unseen: bool = False) -> Layout:
    """Return a random scene with nothing left open, placed. unseen: it holds at least one unseen pair, else none."""
    while True:
        count = rng.choices((1, 2, 3), (25, 40, 35))[0]
        pairs = rng.sample([(s, c) for s in SHAPES for c in COLOURS], count)
        if unseen != any(p in UNSEEN_PAIRS for p in pairs):
            continue
        objects = tuple(Object(s, c, rng.choice(("small", "large"))) for s, c in pairs)
        relations = tuple(rng.choice(RELATIONS) for _ in range(count - 1))
        scene = Scene(objects, relations, rng.choice(tuple(BACKGROUNDS)))
        layout = place(scene, rng)
        if layout is not None:
            return layout


def held_out(n: int = 256, seed: int = 0) -> list[Scene]:
    """Return `n` captioned scenes that training never meets; three in ten hold an unseen pair (`Scene.unseen`)."""
    rng = Random(f"held-out {seed}")
    scenes: list[Scene] = []
    while len(scenes) < n:
        scene = describe(sample_layout(rng, unseen=len(scenes) % 10 in (2, 5, 8)).scene, rng)
        if scene.held_out and scene not in scenes:
            scenes.append(scene)
    return scenes


def place(scene: Scene, rng: Random, tries: int = 400) -> Layout | None:
    """Return sizes and centres that fit a scene, chosen at random, or None where `tries` did not find any.

    Objects keep clear of each other, and a relation holds along the longer of the two distances. The relations say
    roughly where in the picture each object belongs; it stands within a few pixels of there, on the grid of 4 pixels
    that the autoencoder's latents have, so that an object looks alike wherever it stands.
    """
    spots = _spots([r or rng.choice(RELATIONS) for r in scene.relations])
    for _ in range(tries):
        radii = [RADII[o.size or rng.choice(tuple(RADII))] for o in scene.objects]
        centres = [(float(rng.choice(xs)), float(rng.choice(ys))) for xs, ys in spots]
        if apart(radii, centres) and all(map(_related, scene.relations, centres, centres[1:])):
            return Layout(scene, tuple(radii), tuple(centres))
    return None


def apart(radii: Sequence[float], centres: Sequence[tuple[float, float]]) -> bool:
    """Return whether objects of these radii and centres, in pixels, keep clear of each other."""
    return all(
        np.hypot(x - u, y - v) >= (r + q) * _EXTENT + _GAP
        for ((x, y), r), ((u, v), q) in combinations(zip(centres, radii, strict=True), 2)
    )


_MIDDLE, _LOW, _HIGH = (28, 32, 36), (16, 20), (44, 48)
_STEP = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
_Spot = tuple[tuple[int, ...], tuple[int, ...]]


def _spots(relations: Sequence[str]) -> list[_Spot]:
    """Return the x and y coordinates that each object of a chain may take."""
    if len(relations) == 2 and relations[0] == relations[1]:  # three in a row, which only fit as a flat V
        along, across = ((12,), (32,), (52,)), ((20, 24, 28), (36, 40), (20, 24, 28))
        steps = _STEP[relations[0]]
        along = along if sum(steps) > 0 else along[::-1]
        return list(zip(along, across, strict=True) if steps[0] else zip(across, along, strict=True))
    places = [(0, 0)]
    for x, y in (_STEP[r] for r in relations):
        places.append((places[-1][0] + x, places[-1][1] + y))
    if len(places) == 3 and places[0] == places[2]:  # there and back: the two ends stand side by side
        x, y = _STEP[relations[0]]
        places = [(-abs(y), -abs(x)), (2 * x, 2 * y), (abs(y), abs(x))]
    return [(_range(x, [p[0] for p in places]), _range(y, [p[1] for p in places])) for x, y in places]


def _range(value: int, values: list[int]) -> tuple[int, ...]:
    middle = (min(values) + max(values)) / 2
    return _MIDDLE if value == middle else _LOW if value < middle else _HIGH


def _related(relation: str | None, a: tuple[float, float], b: tuple[float, float]) -> bool:
    dx, dy = b[0] - a[0], b[1] - a[1]
    along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy, None: max(abs(dx), abs(dy))}[relation]
    return along >= max(abs(dx), abs(dy))
