"""bfloat16 as bits: what ml_dtypes makes of the same values, but that a finite value stays finite."""

import ml_dtypes
import numpy as np
import pytest

from kernels.cpu.bfloat16 import CHUNK, rounded, widened

ODD = np.array([np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-45, 1.00390625, 1.01171875, np.nan], np.float32)


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (0, 4), (CHUNK + 3,)], ids=str)
def test_rounding_is_to_nearest_even(shape):
    values = np.asarray(np.random.default_rng(0).standard_normal(shape), np.float32)
    expected = values.astype(ml_dtypes.bfloat16)
    for out in (None, np.empty(shape, np.uint16)):
        got = rounded(values, out)
        assert got.dtype == np.uint16 and got.shape == shape and (out is None or got is out)
        np.testing.assert_array_equal(got, expected.view(np.uint16))


def test_what_is_no_usual_number():
    np.testing.assert_array_equal(rounded(ODD), ODD.astype(ml_dtypes.bfloat16).view(np.uint16))
    largest = np.array([3.4e38, -3.4e38], np.float32)
    assert rounded(largest).tolist() == [0x7F7F, 0xFF7F]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
def test_widening_keeps_every_value(dtype):
    values = ODD.astype(dtype)
    bits = values.view(np.uint16) if dtype is ml_dtypes.bfloat16 else values
    for given in (values, bits):
        got = widened(given)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, values.astype(np.float32))
    assert (widened(values) is values) == (dtype is np.float32)
