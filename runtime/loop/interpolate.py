"""Between two starts of a picture."""

from __future__ import annotations

import numpy as np

NEARLY_PARALLEL = 1e-7
"""Cosines are kept this far from ±1, so that the sine of the angle is not zero."""


def slerp(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    """Spherical interpolation (Shoemake, 1985) of latents or other noise, whose length is then kept.

    a, b: of one shape, each taken as one vector; share: 0 gives a, 1 gives b. Computed in float64, returned in the
    dtype of `a`. Raises ValueError for other shapes, or where one of them is zero.
    """
    if a.shape != b.shape:
        raise ValueError(f"slerp: got shapes {a.shape} and {b.shape}, expected one; use latents of one picture size")
    p, q = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    lengths = np.linalg.norm(p) * np.linalg.norm(q)
    if lengths == 0:
        raise ValueError("slerp: got only zeros, which point nowhere; expected noise")
    angle = np.arccos(np.clip(p @ q / lengths, NEARLY_PARALLEL - 1, 1 - NEARLY_PARALLEL))
    between = (np.sin((1 - share) * angle) * p + np.sin(share * angle) * q) / np.sin(angle)
    return between.reshape(a.shape).astype(a.dtype)
