"""Drawing: layouts become pictures, with edges softened over a pixel."""

from collections.abc import Sequence

import numpy as np

from models.world.scenes import BACKGROUNDS, COLOURS, IMAGE_SIZE, SHAPES, Layout

_WINDOW = 28  # pixels square, enough for the largest object


def coverage(shape: str, x: np.ndarray, y: np.ndarray, r: np.ndarray | float) -> np.ndarray:
    """Return how much of each pixel a shape covers, 0 to 1.

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
