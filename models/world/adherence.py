"""A judge of pictures, by plain image processing: does each show what its caption asks for?

The background is read off the picture's frame. What differs from it falls into connected regions, and each region is
measured: its colour is the median of its inner pixels, its shape the template that overlaps it best, its size the
radius of that template. A picture passes when the regions are exactly the objects asked for, related as asked.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from scipy import ndimage

from models.world.drawing import coverage
from models.world.scenes import BACKGROUNDS, COLOURS, IMAGE_SIZE, RADII, SHAPES, Object, Scene

COLOUR_TOLERANCE = 60.0  # RGB distance to the nearest named colour; two named colours are never closer than 75
FOREGROUND = 45.0  # RGB distance from the background at which a pixel belongs to an object
SMALLEST_REGION = 10  # pixels; less is noise, and the smallest object drawn covers more than 40
LEAST_OVERLAP = 0.80  # intersection over union with the best template
LEAST_PURITY = 0.85  # share of a region's inner pixels that have its colour
LEAST_DISTANCE = 4.0  # pixels between two centres along the axis of a relation
SIZE_LIMIT = (RADII["small"] + RADII["large"]) / 2


@dataclass(frozen=True)
class Found:
    """A find is a region of a picture: names (None where it fits none), radius and centre in pixels."""

    shape: str | None
    colour: str | None
    radius: float
    centre: tuple[float, float]

    @property
    def size(self) -> str:
        return "small" if self.radius < SIZE_LIMIT else "large"

    def __str__(self) -> str:
        return f"{self.size} {self.colour or 'oddly coloured'} {self.shape or 'shapeless thing'}"


@dataclass(frozen=True)
class Verdict:
    """The judgement of a picture: whether it shows the scene, and if not, what is wrong with it."""

    ok: bool
    problems: list[str]


def check(image: np.ndarray, scene: Scene, colours: bool = True) -> Verdict:
    """Judge one picture.

    Args:
        image: uint8 [64, 64, 3], RGB.
        scene: what was asked for; what it leaves open may be anything.
        colours: whether those of objects and background count.

    Returns:
        ok only if the picture shows every object asked for and no other, in shape, colour, size and relation, and the
        background where one is named. The problems are those of the best assignment of regions to objects.
    """
    background, found = find(image)
    problems: list[str] = []
    if colours and scene.background not in (None, background):
        problems.append(f"background is {background or 'no known colour'}, not {scene.background}")
    if background is None and scene.background is None:
        problems.append("background is no known colour")
    if len(found) != len(scene.objects):
        seen = ", ".join(map(str, found)) or "nothing"
        problems.append(f"{len(found)} objects instead of {len(scene.objects)}: {seen}")
    else:
        assignments = [list(_compare(scene, order, colours)) for order in permutations(found)]
        best: list[str] = min(assignments, key=len)
        problems += best
    return Verdict(not problems, problems)


def find(image: np.ndarray) -> tuple[str | None, list[Found]]:
    """Return the background's name and the objects of a picture, uint8 [64, 64, 3]."""
    pixels = image.astype(np.float32)
    background, distance = stands_out(image)
    regions, count = ndimage.label(distance > FOREGROUND)
    found = []
    for i in range(1, count + 1):
        region = regions == i
        if region.sum() >= SMALLEST_REGION:
            found.append(_measure(pixels, region, background))
    return _nearest(background, BACKGROUNDS), found


def stands_out(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the background, RGB, and the distance of every pixel from it, float32, of a picture, uint8 [64, 64, 3]."""
    if image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(f"got {image.dtype} {image.shape}, expected uint8 ({IMAGE_SIZE}, {IMAGE_SIZE}, 3), RGB")
    pixels = image.astype(np.float32)
    background = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    return background, _distance(pixels, background)


def _measure(pixels: np.ndarray, region: np.ndarray, background: np.ndarray) -> Found:
    depth = ndimage.distance_transform_edt(region)
    inner = region & (depth >= min(2.0, depth.max()))
    colour = np.median(pixels[inner], axis=0)
    pure = float((_distance(pixels[inner], colour) < COLOUR_TOLERANCE).mean())

    # How much of each pixel the object covers: where its colour lies between the background's and the object's.
    axis = colour - background
    near = ndimage.binary_dilation(region, iterations=1)
    cover = np.clip((pixels - background) @ axis / (axis @ axis), 0.0, 1.0) * near
    area = float(cover.sum())
    grid = np.arange(IMAGE_SIZE) + 0.5
    centre = float((cover.sum(0) * grid).sum() / area), float((cover.sum(1) * grid).sum() / area)
    radius = {s: float(np.sqrt(area / _UNIT_AREA[s])) for s in SHAPES}
    overlap = {}
    for s in SHAPES:
        template = coverage(s, grid[None, :] - centre[0], grid[:, None] - centre[1], radius[s])
        overlap[s] = float(np.minimum(cover, template).sum() / np.maximum(cover, template).sum())
    shape = max(SHAPES, key=overlap.__getitem__)
    fits = overlap[shape] >= LEAST_OVERLAP
    name = _nearest(colour, COLOURS) if pure >= LEAST_PURITY else None
    return Found(shape if fits else None, name, radius[shape], centre)


def _compare(scene: Scene, found: tuple[Found, ...], colours: bool) -> Iterator[str]:
    for want, have in zip(scene.objects, found, strict=True):
        yield from _differences(want, have, colours)
    for relation, a, b in zip(scene.relations, found, found[1:], strict=False):
        dx, dy = b.centre[0] - a.centre[0], b.centre[1] - a.centre[1]
        along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy, None: np.inf}[relation]
        if along < LEAST_DISTANCE:
            yield f"{a} is not {relation} {b}"


def _differences(want: Object, have: Found, colours: bool) -> Iterator[str]:
    if have.shape != want.shape:
        yield f"{have} should be a {want.shape}"
    if colours and have.colour != want.colour:
        yield f"{have} should be {want.colour}"
    if want.size not in (None, have.size):
        yield f"{have} should be {want.size}"


def _distance(pixels: np.ndarray, colour: np.ndarray) -> np.ndarray:
    return np.sqrt(((pixels - colour) ** 2).sum(-1))


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str | None:
    distances = {name: float(_distance(colour, np.array(rgb))) for name, rgb in (COLOURS | BACKGROUNDS).items()}
    name = min(distances, key=distances.__getitem__)
    return name if name in palette and distances[name] <= COLOUR_TOLERANCE else None


def _unit_area(shape: str) -> float:
    grid = np.arange(-400, 400) + 0.5
    return float(coverage(shape, grid[None, :], grid[:, None], 250.0).sum()) / 250.0**2


_UNIT_AREA = {shape: _unit_area(shape) for shape in SHAPES}
