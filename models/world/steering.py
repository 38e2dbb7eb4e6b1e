"""Judges of steered pictures, by plain image processing: do they keep to the hint, and to the LoRA's style?"""

import numpy as np

from models.world.adherence import FOREGROUND, SIZE_LIMIT, find, stands_out
from models.world.scenes import Layout, Scene

NEAR = 2.0
"""Pixels between where an object stands and where it should."""
INK, PAPER = "red", "white"
"""Colours of the style of models/shapes-red-chalk."""


def in_place(image: np.ndarray, layout: Layout, told: Scene | None = None) -> bool:
    """Return whether a picture, uint8 [64, 64, 3], shows the objects of a layout in their places, and no other.

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
    """Return the intersection over union of what stands out from the background in two pictures, uint8 [64, 64, 3]."""
    a, b = (stands_out(picture)[1] > FOREGROUND for picture in (image, drawn))
    return float((a & b).sum() / max((a | b).sum(), 1))


def in_style(image: np.ndarray) -> bool:
    """Return whether everything in a picture, uint8 [64, 64, 3], is INK on PAPER."""
    background, found = find(image)
    return background == PAPER and bool(found) and all(region.colour == INK for region in found)
