"""The world of the `shapes` model: coloured objects on a plain background, and the captions kept out of training.

A `Scene` is what a caption says; what it leaves open (`None`) may be anything in the picture. A scene is a chain:
object i stands in `relations[i]` to object i + 1. Pixel coordinates run right and down from the top left corner.
"""

import zlib
from dataclasses import dataclass, replace

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
RADII = {"small": 6.4, "large": 9.6}
"""Size → pixels."""
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
"""Shape-colour pairs that never occur in training."""

IMAGE_SIZE = 64
MAX_OBJECTS = 3
_HELD_OUT_EVERY = 10  # one caption meaning in ten is kept out of training


@dataclass(frozen=True)
class Object:
    """An object is one thing of a scene; `size` None means either size will do."""

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
    """The meaning of a caption: a chain of objects, the relation of each to the next, and the background."""

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
        """Return whether it holds a shape-colour pair that never occurs in training."""
        return any((o.shape, o.colour) in UNSEEN_PAIRS for o in self.objects)

    @property
    def held_out(self) -> bool:
        """Return whether training must not meet its caption, in any wording and from either end of the chain."""
        key = min(_key(self), _key(self.reversed()))
        return self.unseen or zlib.crc32(key.encode()) % _HELD_OUT_EVERY == 0

    def reversed(self) -> "Scene":
        """Return the same scene told from the other end: a left of b is b right of a."""
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
