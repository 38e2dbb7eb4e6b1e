"""Scenes for a ControlNet for edges: a picture says where things stand, and a caption only what they are."""

from dataclasses import replace
from random import Random

import numpy as np

from models.world.captions import caption
from models.world.layouts import apart, sample_layout
from models.world.scenes import Layout, Scene
from runtime.pictures.hints import canny


def scatter(layout: Layout, rng: Random) -> Layout:
    """Return the same objects anywhere on the grid of 4 pixels, clear of each other, whatever their relations were."""
    scene = replace(layout.scene, relations=(None,) * len(layout.scene.relations))
    while True:
        centres = tuple((float(rng.randrange(12, 53, 4)), float(rng.randrange(12, 53, 4))) for _ in layout.radii)
        if apart(layout.radii, centres):
            return Layout(scene, layout.radii, centres)


def only_named(scene: Scene, rng: Random) -> Scene:
    """Return a scene as the caption beside a hint tells it: in any order, seldom a size, most often the background."""
    objects = tuple(replace(o, size=o.size if rng.random() < 0.3 else None) for o in scene.objects)
    objects = tuple(rng.sample(objects, len(objects)))
    told = Scene(objects, (None,) * (len(objects) - 1), scene.background if rng.random() < 0.7 else None)
    return replace(told, caption=caption(told, rng))


def training_caption(scene: Scene, rng: Random) -> str:
    """Return a wording that training may meet, or "" once in ten, when the hint alone says what to draw."""
    for _ in range(8 if rng.random() >= 0.1 else 0):
        told = only_named(scene, rng)
        if not told.held_out:
            return told.caption
    return ""


def held_out(n: int, seed: int = 0) -> list[tuple[Layout, Scene]]:
    """Return `n` layouts, each with a caption that training never meets; three in ten hold an unseen pair."""
    rng = Random(f"edges {seed}")
    found: list[tuple[Layout, Scene]] = []
    while len(found) < n:
        layout = scatter(sample_layout(rng, unseen=len(found) % 10 in (2, 5, 8)), rng)
        told = only_named(layout.scene, rng)
        if told.held_out:
            found.append((layout, told))
    return found


def edges(images: np.ndarray) -> np.ndarray:
    """Return hints of pictures, uint8 [n, 64, 64, 3], as the runtime makes them: uint8 [n, 64, 64], 255 along edges."""
    return np.stack([np.asarray(canny(image))[:, :, 0] for image in images])
