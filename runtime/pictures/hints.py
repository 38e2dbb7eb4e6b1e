"""Hints of ControlNets that are made from a picture; any other is given as a picture itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from engines import EngineError


def canny(image: Image.Image | np.ndarray, low: float = 100, high: float = 200) -> Image.Image:
    """Return white edges on black, RGB with three equal channels, of the size of `image` (Canny, 1986, as in OpenCV).

    image: PIL, or uint8 [h, w, 3] (RGB) or [h, w]. low, high: gradients that an edge may have, and that it must have
    somewhere; 100 and 200 are what ControlNets for edges are used with. The gradient is that of the strongest channel.
    Raises ValueError for another array or thresholds out of order, EngineError where OpenCV is missing.
    """
    pixels = np.asarray(image if not isinstance(image, Image.Image) or image.mode in ("L", "RGB")
                        else image.convert("RGB"))
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise ValueError(f"image: got {pixels.dtype} {list(pixels.shape)}, expected uint8 [h, w, 3] or [h, w]")
    if not 0 <= low <= high:
        raise ValueError(f"low, high: got {low!r} and {high!r}, expected 0 <= low <= high")
    edges = _opencv().Canny(np.ascontiguousarray(pixels), low, high)
    return Image.fromarray(np.repeat(edges[:, :, None], 3, axis=2))


PREPROCESSORS: dict[str, Callable[[Image.Image], Image.Image]] = {"canny": canny}
"""Functions that make a hint of a picture, by the name that requests know."""


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as e:
        raise EngineError(f"canny needs OpenCV ({e}); run: pip install opencv-python-headless") from e
    return cv2
