"""The world of the `shapes` model: coloured objects on a plain background, their captions, and the held-out split.

A `Scene` is what a caption says; what it leaves open (`None`) may be anything in the picture. A scene is a chain:
object i stands in `relations[i]` to object i + 1. Pixel coordinates run right and down from the top left corner.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from random import Random

import numpy as np

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
COLOURS = {
    "red": (225, 30, 40),
    "green": (40, 165, 55),
    "blue": (40, 85, 240),
    "yellow": (250, 225, 40),
    "orange": (255, 130, 10),
    "purple": (140, 40, 185),
    "cyan": (50, 215, 230),
    "pink": (255, 150, 200),
}
BACKGROUNDS = {
    "black": (10, 10, 10),
    "white": (245, 245, 245),
    "grey": (125, 125, 125),
    "navy": (15, 20, 85),
    "brown": (95, 60, 30),
}
RADII = {"small": 6.4, "large": 9.6}  # pixels
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(INVERSE)
UNSEEN_PAIRS = frozenset(
    {
        ("circle", "purple"),
        ("square", "yellow"),
        ("triangle", "cyan"),
        ("diamond", "green"),
        ("star", "blue"),
        ("cross", "orange"),
    }
)

IMAGE_SIZE = 64
MAX_OBJECTS = 3
_EXTENT = 1.2  # no shape reaches further than this many radii from its centre
_GAP = 1.0  # pixels between the extents of two objects
_WINDOW = 28  # pixels square, enough for the largest object
_HELD_OUT_EVERY = 10  # one caption meaning in ten is kept out of training

_WORDING = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_OPENINGS = ("", "", "a picture of ", "there is ", "an image with ")
WORDS = tuple(
    sorted(
        {
            *SHAPES,
            *COLOURS,
            *BACKGROUNDS,
            *RADII,
            *" ".join(w for ws in _WORDING.values() for w in ws).split(),
            *" ".join(_OPENINGS).split(),
            *"a an and the is which on background ,".split(),
        }
    )
)


@dataclass(frozen=True)
class Object:
    """One object of a scene; `size` None means either size will do."""

    shape: str
    colour: str
    size: str | None = None

    def __post_init__(self) -> None:
        if self.shape not in SHAPES or self.colour not in COLOURS or self.size not in (None, *RADII):
            raise ValueError(
                f"got {self.shape!r}, {self.colour!r}, {self.size!r}; expected a shape of {SHAPES}, "
                f"a colour of {tuple(COLOURS)} and a size of {tuple(RADII)} or None"
            )


@dataclass(frozen=True)
class Scene:
    """What a caption asks for: a chain of objects, the relation of each to the next, and the background."""

    objects: tuple[Object, ...]
    relations: tuple[str | None, ...] = ()
    background: str | None = None
    caption: str = ""

    def __post_init__(self) -> None:
        if not 1 <= len(self.objects) <= MAX_OBJECTS:
            raise ValueError(f"got {len(self.objects)} objects, expected 1 to {MAX_OBJECTS}")
        if len({(o.shape, o.colour) for o in self.objects}) < len(self.objects):
            raise ValueError(f"got two objects of one shape and colour in {self.objects}; make them differ in one")
        if len(self.relations) != len(self.objects) - 1 or set(self.relations) - {None, *RELATIONS}:
            raise ValueError(f"got relations {self.relations}, expected {len(self.objects) - 1} of {RELATIONS} or None")
        if self.background not in (None, *BACKGROUNDS):
            raise ValueError(f"got background {self.background!r}, expected one of {tuple(BACKGROUNDS)} or None")

    @property
    def unseen(self) -> bool:
        """Whether it holds a shape-colour pair that never occurs in training."""
        return any((o.shape, o.colour) in UNSEEN_PAIRS for o in self.objects)

    @property
    def held_out(self) -> bool:
        """Whether training must not meet its caption, in any wording and from either end of the chain."""
        key = min(_key(self), _key(self.reversed()))
        return self.unseen or zlib.crc32(key.encode()) % _HELD_OUT_EVERY == 0

    def reversed(self) -> "Scene":
        """The same scene told from the other end: a left of b is b right of a."""
        relations = tuple(INVERSE[r] if r else None for r in reversed(self.relations))
        return replace(self, objects=self.objects[::-1], relations=relations)


@dataclass(frozen=True)
class Layout:
    """A scene with every open choice made: radius and centre of each object in pixels."""

    scene: Scene
    radii: tuple[float, ...]
    centres: tuple[tuple[float, float], ...]


def _key(scene: Scene) -> str:
    objects = [f"{o.size} {o.colour} {o.shape}" for o in scene.objects]
    return f"{objects}{list(scene.relations)}{scene.background}"


# --- captions


def caption(scene: Scene, rng: Random) -> str:
    """One of the wordings of a scene, at most 30 words and commas long; `parse` reads it back."""
    names = [_name(o) for o in scene.objects]
    chained = all(scene.relations)
    opening = rng.choice(_OPENINGS)
    again = len(names) == 3 and chained and rng.random() < 0.4
    if len(names) == 1:
        body = names[0]
    elif not chained:
        body = ", ".join(names[:-1]) + " and " + names[-1]
    else:
        words = [rng.choice(_WORDING[r]) for r in scene.relations if r]
        body = f"{names[0]} {words[0]} {names[1]}"
        if not opening and rng.random() < 0.3:
            body = f"{names[0]} is {words[0]} {names[1]}"
        if len(names) == 3:
            middle = scene.objects[1]
            opening = "" if again else opening  # both together would pass the text encoder's length
            body = body.replace(" is ", " ")
            body += f", and the {middle.colour} {middle.shape} is" if again else ", which is"
            body += f" {words[1]} {names[2]}"
    if scene.background is None:
        return opening + body
    if not opening and not again and rng.random() < 0.3:
        return f"on a {scene.background} background, {body}"
    return f"{opening}{body} on a {scene.background} background"


def _name(o: Object) -> str:
    words = " ".join(w for w in (o.size, o.colour, o.shape) if w)
    return ("an " if words[0] in "aeiou" else "a ") + words


_OBJECT = re.compile(rf"\b(a|an|the) (?:({'|'.join(RADII)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
_RELATION = re.compile(r"\b(left of|right of|above|over|below|under)\b")


def parse(text: str) -> Scene:
    """The scene a caption describes.

    Raises:
        ValueError: the text names no object, or is outside the grammar of `caption`.
    """
    unknown = set(re.findall(r"[a-z]+|[^a-z\s]", text)) - set(WORDS)
    if unknown:
        raise ValueError(f"got the words {sorted(unknown)} in {text!r}, expected words of models.world.scenes.WORDS")
    objects = tuple(Object(m[4], m[3], m[2]) for m in _OBJECT.finditer(text) if m[1] != "the")
    meaning = {wording: name for name, wordings in _WORDING.items() for wording in wordings}
    relations: tuple[str | None, ...] = tuple(meaning[m[1]] for m in _RELATION.finditer(text))
    background = re.search(rf"\b({'|'.join(BACKGROUNDS)}) background", text)
    return Scene(objects, relations or (None,) * (len(objects) - 1), background[1] if background else None, text)


# --- sampling


def sample_layout(rng: Random, unseen: bool = False) -> Layout:
    """A random scene with nothing left open, placed. With `unseen` it holds at least one unseen pair, else none."""
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


def describe(scene: Scene, rng: Random) -> Scene:
    """Leave some of a scene open and put the rest into words."""
    told = scene.reversed() if rng.random() < 0.5 else scene
    objects = tuple(replace(o, size=o.size if rng.random() < 0.7 else None) for o in told.objects)
    relations = told.relations if rng.random() < 0.9 else (None,) * len(told.relations)
    background = told.background if rng.random() < 0.65 else None
    told = Scene(objects, relations, background)
    return replace(told, caption=caption(told, rng))


def training_caption(scene: Scene, rng: Random, open_share: float = 1.0) -> str:
    """A wording of a seen scene that training may meet, or "" in the rare case that chance offers none.

    open_share: how many captions may leave something open, as `describe` does; the others tell the whole scene.
    """
    for _ in range(8):
        if rng.random() < open_share:
            told = describe(scene, rng)
        else:
            told = scene.reversed() if rng.random() < 0.5 else scene
            told = replace(told, caption=caption(told, rng))
        if not told.held_out:
            return told.caption
    return ""


def held_out(n: int = 256, seed: int = 0) -> list[Scene]:
    """`n` captioned scenes that training never meets; three in ten hold an unseen pair (`Scene.unseen`)."""
    rng = Random(f"held-out {seed}")
    scenes: list[Scene] = []
    while len(scenes) < n:
        scene = describe(sample_layout(rng, unseen=len(scenes) % 10 in (2, 5, 8)).scene, rng)
        if scene.held_out and scene not in scenes:
            scenes.append(scene)
    return scenes


def place(scene: Scene, rng: Random, tries: int = 400) -> Layout | None:
    """Sizes and centres that fit a scene, chosen at random, or None where `tries` did not find any.

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
    """Whether objects of these radii and centres, in pixels, keep clear of each other."""
    return all(
        np.hypot(x - u, y - v) >= (r + q) * _EXTENT + _GAP
        for ((x, y), r), ((u, v), q) in combinations(zip(centres, radii, strict=True), 2)
    )


_MIDDLE, _LOW, _HIGH = (28, 32, 36), (16, 20), (44, 48)
_STEP = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
_Spot = tuple[tuple[int, ...], tuple[int, ...]]


def _spots(relations: Sequence[str]) -> list[_Spot]:
    """The x and y coordinates that each object of a chain may take."""
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


# --- drawing


def coverage(shape: str, x: np.ndarray, y: np.ndarray, r: np.ndarray | float) -> np.ndarray:
    """How much of each pixel a shape covers, 0 to 1.

    Args:
        shape: one of SHAPES.
        x, y: pixel centres relative to the shape's centroid, in pixels; any shapes that broadcast with `r`.
        r: radius in pixels.

    The edge is softened over one pixel of the signed distance to the outline.
    """
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        distance = np.hypot(x, y) - r
    elif shape == "square":
        distance = np.maximum(ax, ay) - 0.85 * r
    elif shape == "diamond":
        distance = (ax + ay - 1.15 * r) * np.sqrt(0.5)
    elif shape == "triangle":  # circumradius 1.2, so inradius 0.6
        distance = np.maximum(y, ax * np.sqrt(0.75) - 0.5 * y) - 0.6 * r
    elif shape == "cross":
        long, wide = 1.05 * r, 0.36 * r
        distance = np.maximum(np.minimum(ax, ay) - wide, np.maximum(ax, ay) - long)
    elif shape == "star":
        angle = np.arctan2(ax, -y)  # 0 at the upper point; folded into one half of one of five points
        angle = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        rho = np.hypot(x, y)
        outer, inner = 1.2 * r, 0.55 * r
        ex, ey = inner * np.sin(np.pi / 5), inner * np.cos(np.pi / 5) - outer
        length = np.hypot(ex, ey)
        distance = (rho * np.sin(angle) * -ey + (rho * np.cos(angle) - outer) * ex) / length
    else:
        raise ValueError(f"got shape {shape!r}, expected one of {SHAPES}")
    return np.clip(0.5 - distance, 0.0, 1.0)


def draw(layouts: Sequence[Layout]) -> np.ndarray:
    """Draw layouts whose background is named: uint8 pictures [N, 64, 64, 3]."""
    image = np.array([BACKGROUNDS[v.scene.background or "black"] for v in layouts], np.float32)[:, None, None, :]
    image = np.tile(image, (1, IMAGE_SIZE, IMAGE_SIZE, 1))
    # One object of each picture at a time, so that no picture is indexed twice in one update.
    parts: dict[tuple[int, str], list[tuple[int, str, float, tuple[float, float]]]] = {}
    for n, layout in enumerate(layouts):
        for i, (o, r, c) in enumerate(zip(layout.scene.objects, layout.radii, layout.centres, strict=True)):
            parts.setdefault((i, o.shape), []).append((n, o.colour, r, c))
    for (_, shape), items in parts.items():
        where = np.array([i[0] for i in items])
        paint = np.array([COLOURS[i[1]] for i in items], np.float32)[:, None, None, :]
        radius = np.array([i[2] for i in items], np.float32)[:, None, None]
        centre = np.array([i[3] for i in items], np.float32)
        corner = np.clip(centre.astype(int) - _WINDOW // 2, 0, IMAGE_SIZE - _WINDOW)
        columns, rows = (corner[:, i, None] + np.arange(_WINDOW) for i in (0, 1))
        x = (columns + 0.5 - centre[:, 0, None]).astype(np.float32)[:, None, :]
        y = (rows + 0.5 - centre[:, 1, None]).astype(np.float32)[:, :, None]
        window = where[:, None, None], rows[:, :, None], columns[:, None, :]
        image[window] += coverage(shape, x, y, radius)[..., None] * (paint - image[window])
    return np.rint(image).astype(np.uint8)
