"""Does a picture of the shapes model keep to its hint, and to its LoRA's style? By plain image processing."""

import numpy as np

from models.world.adherence import FOREGROUND, SIZE_LIMIT, find, stands_out
from models.world.scenes import Layout, Scene

NEAR = 2.0  # pixels between where an object stands and where it should
INK, PAPER = "red", "white"  # the style of models/shapes-red-chalk


def in_place(image: np.ndarray, layout: Layout, told: Scene | None = None) -> bool:
    """Whether a picture, uint8 [64, 64, 3], shows the objects of a layout where they stand there, and no other.

    told: what the caption said; a background that it leaves open may be any.
    """
    background, found = find(image)
    wanted = {(o.shape, o.colour): (r, c) for o, r, c in
              zip(layout.scene.objects, layout.radii, layout.centres, strict=True)}
    seen = {(f.shape, f.colour): f for f in found}
    if len(found) != len(wanted) or set(seen) != set(wanted):
        return False
    if (told or layout.scene).background not in (None, background):
        return False
    near = (np.hypot(*np.subtract(seen[name].centre, centre)) <= NEAR for name, (_, centre) in wanted.items())
    sized = ((seen[name].radius < SIZE_LIMIT) == (radius < SIZE_LIMIT) for name, (radius, _) in wanted.items())
    return all(near) and all(sized)


def overlap(image: np.ndarray, drawn: np.ndarray) -> float:
    """Intersection over union of what stands out from the background in two pictures, uint8 [64, 64, 3]."""
    a, b = (stands_out(picture)[1] > FOREGROUND for picture in (image, drawn))
    return float((a & b).sum() / max((a | b).sum(), 1))


def in_style(image: np.ndarray) -> bool:
    """Whether everything in a picture, uint8 [64, 64, 3], is INK on PAPER."""
    background, found = find(image)
    return background == PAPER and bool(found) and all(one.colour == INK for one in found)
