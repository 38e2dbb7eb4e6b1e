"""Group norm in C++ against float64, at every instruction set of this machine that has its own."""

import numpy as np
import pytest
import torch

from kernels.cpu import cpp, library
from tests.cases.cpu import DTYPES, largest, normal, passes, poisoned, to_torch

if reason := library.available():
    pytest.skip(reason, allow_module_level=True)

GROUP_NORM = {
    # batch, channels, positions, groups
    "minimal": (1, 2, 1, 1),
    "one-group": (1, 7, 5, 1),
    "odd": (2, 30, 77, 6),
    "group-of-one": (1, 17, 19, 17),
    "sd15-64": (1, 320, 4096, 32),
    "sd15-8": (2, 1280, 64, 32),
    "sd15-skip": (1, 2560, 64, 32),
    "vae-512": (1, 128, 16384, 32),
}


def exact_group_norm(x: np.ndarray, groups: int, weight: np.ndarray, bias: np.ndarray, eps: float,
                      silu: bool) -> np.ndarray:
    grouped = x.astype(np.float64).reshape(x.shape[0], groups, -1)
    unit = (grouped - grouped.mean(-1, keepdims=True)) / np.sqrt(grouped.var(-1, keepdims=True) + eps)
    y = unit.reshape(x.shape) * weight.astype(np.float64)[:, None] + bias.astype(np.float64)[:, None]
    return y / (1 + np.exp(-y)) if silu else y


@pytest.mark.parametrize("silu", [False, True], ids=["plain", "silu"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", GROUP_NORM.values(), ids=GROUP_NORM)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", library.isas()[:2])
def test_group_norm(isa, dtype, case, channels_last, silu):
    batch, channels, positions, groups = case
    x = (normal((batch, channels, positions), dtype, 0).astype(np.float32) * 2 + 3).astype(DTYPES[dtype])
    weight, bias = normal((channels,), dtype, 1), normal((channels,), dtype, 2)
    eps = 1e-6 if silu else 1e-5
    exact = exact_group_norm(x, groups, weight, bias, eps, silu)
    stored = np.ascontiguousarray(x.transpose(0, 2, 1)) if channels_last else x
    out = cpp.group_norm(stored, groups, weight, bias, poisoned(stored), eps=eps, silu=silu, threads=2,
                         channels_last=channels_last, isa=isa)
    out = out.transpose(0, 2, 1) if channels_last else out
    peer = torch.nn.functional.group_norm(*(to_torch(a, dtype) if isinstance(a, np.ndarray) else a
                                            for a in (x, groups, weight, bias)), eps)
    peer = torch.nn.functional.silu(peer) if silu else peer
    assert passes(out, exact, peer, dtype)
    assert not passes(out.astype(np.float64) * 1.01, exact, peer, dtype), "a wrong result would pass"


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("isa", library.isas()[:2])
def test_group_norm_of_a_small_variance(isa, channels_last):
    """E[x²] − E[x]² in float32 would leave nothing of a variance of 1 beside a mean of 3000."""
    x = (np.random.default_rng(0).standard_normal((1, 8, 5000)) + 3000).astype(np.float32)
    one, zero = np.ones(8, np.float32), np.zeros(8, np.float32)
    exact = exact_group_norm(x, 2, one, zero, 1e-5, False)
    stored = np.ascontiguousarray(x.transpose(0, 2, 1)) if channels_last else x
    out = cpp.group_norm(stored, 2, one, zero, channels_last=channels_last, threads=1, isa=isa)
    assert largest((out.transpose(0, 2, 1) if channels_last else out) - exact) < 1e-3


def test_group_norm_in_place():
    x = normal((2, 64, 9, 9), "fp32", 0)
    weight, bias = normal((64,), "fp32", 1), normal((64,), "fp32", 2)
    expected = cpp.group_norm(x, 32, weight, bias, silu=True)
    assert np.array_equal(cpp.group_norm(x, 32, weight, bias, x, silu=True), expected)


@pytest.mark.parametrize("isa", library.isas()[:2])
def test_silu_of_large_values(isa):
    x = np.array([[[-1e4, -300, -90, -20, 0, 20, 90, 1e4]]], np.float32)
    out = cpp.group_norm(x, 1, np.full(1, 1e4, np.float32), np.zeros(1, np.float32), silu=True, isa=isa)
    exact = exact_group_norm(x, 1, np.full(1, 1e4), np.zeros(1), 1e-5, False)
    with np.errstate(over="ignore"):
        assert np.allclose(out, exact / (1 + np.exp(-exact)), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"groups": 5}, "groups: got 5 for 16 channels"),
    ({"weight": np.zeros(8, np.float32)}, r"weight: got shape \(8,\)"),
    ({"x": np.zeros((1, 16, 4), np.int32)}, "x: got dtype int32"),
    ({"x": np.zeros((1, 16, 4), ">f4")}, "x: got dtype >f4"),
    ({"bias": np.zeros(16, ">f4")}, "bias: got dtype >f4"),
    ({"x": np.zeros((1, 4, 16), np.float32).swapaxes(1, 2)}, "x: got strides"),
    ({"out": np.zeros((1, 16, 5), np.float32)}, "out: got"),
    ({"eps": -1.0}, "eps: got -1"),
], ids=["groups", "weight", "dtype", "byte-order", "byte-order-bias", "strides", "out", "eps"])
def test_group_norm_refuses(wrong, message):
    good = {"x": np.zeros((1, 16, 4), np.float32), "groups": 4, "weight": np.zeros(16, np.float32),
            "bias": np.zeros(16, np.float32)}
    with pytest.raises(ValueError, match=message):
        cpp.group_norm(**{**good, **wrong})
