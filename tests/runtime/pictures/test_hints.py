"""Hints made of pictures."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from engines import EngineError
from runtime.pictures.hints import canny


def test_canny():
    """Edges of a white square, one pixel wide, in three equal channels; the same for grey and colour."""
    pytest.importorskip("cv2", reason="needs opencv-python-headless")
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[8:24, 12:36] = 255
    found = canny(Image.fromarray(picture))
    edges = np.asarray(found)
    assert (found.size, found.mode) == ((48, 32), "RGB") and set(np.unique(edges)) == {0, 255}
    assert (edges == edges[..., :1]).all() and edges[8:24, 11:13, 0].any(axis=1).all()
    assert not edges[12:20, 16:32].any() and not edges[:6].any()
    for other in (picture, picture[..., 0], Image.fromarray(picture).convert("RGBA")):
        assert np.array_equal(np.asarray(canny(other)), edges)
    faint = (picture // 8).astype(np.uint8)
    assert not np.asarray(canny(faint)).any() and np.asarray(canny(faint, 10, 20)).any()
    for wrong, message in ((picture.astype(np.float32), "image: got float32"), (picture[None], "expected uint8")):
        with pytest.raises(ValueError, match=message):
            canny(wrong)
    with pytest.raises(ValueError, match="low, high: got 200 and 100"):
        canny(picture, 200, 100)


def test_canny_without_opencv_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(EngineError, match=r"canny needs OpenCV .* run: pip install opencv-python-headless"):
        canny(np.zeros((8, 8), np.uint8))
