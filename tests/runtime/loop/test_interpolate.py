"""Spherical interpolation keeps lengths and ends where it should."""

import numpy as np
import pytest

from runtime.loop.interpolate import slerp


def test_on_the_circle():
    a, b = np.array([1.0, 0.0]), np.array([0.0, 2.0])
    np.testing.assert_allclose(slerp(a, b, 0.5), [np.sqrt(0.5), 2 * np.sqrt(0.5)], rtol=1e-12)
    np.testing.assert_allclose(slerp(a, b, 1 / 3), [np.cos(np.pi / 6), 2 * np.sin(np.pi / 6)], rtol=1e-12)


def test_ends_lengths_and_dtype():
    a, b = np.random.default_rng(0).standard_normal((2, 4, 8, 16)).astype(np.float32)
    for share, end in ((0.0, a), (1.0, b)):
        np.testing.assert_allclose(slerp(a, b, share), end, atol=1e-6)
    middle = slerp(a, b, 0.5)
    assert middle.dtype == np.float32 and abs(np.linalg.norm(middle) / np.linalg.norm(a) - 1) < 0.05
    assert np.linalg.norm((a + b) / 2) < 0.8 * np.linalg.norm(middle)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_same_and_the_opposite_direction(sign):
    a = np.ones(3)
    assert np.isfinite(slerp(a, sign * a, 0.5)).all()
    np.testing.assert_allclose(slerp(a, a, 0.3), a, atol=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match="got shapes"):
        slerp(np.ones(3), np.ones(4), 0.5)
    with pytest.raises(ValueError, match="point nowhere"):
        slerp(np.ones(3), np.zeros(3), 0.5)
