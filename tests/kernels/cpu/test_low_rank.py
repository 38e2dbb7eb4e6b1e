"""Weights with a change of low rank: `cpp.low_rank` at every instruction set, and numpy, which stands in without it."""

import numpy as np
import pytest

from engines.onnx.low_rank import LowRank, constant, round_to_bfloat16, widened
from kernels.cpu import cpp, library


@pytest.mark.parametrize("isa", ["numpy", "avx2", "avx512", "amx"])
@pytest.mark.parametrize("base", [np.float32, np.float16, np.uint16], ids=["fp32", "fp16", "bf16"])
def test_a_change_of_low_rank_is_summed_and_rounded_once(isa, base, monkeypatch):
    """Ranks, sizes beside those of tiles, and what bfloat16 does with the largest, the smallest and no numbers."""
    if isa == "numpy":
        monkeypatch.setattr(library, "available", lambda: "not built")
    elif library.available() or isa not in library.isas():
        pytest.skip(f"no {isa} here")
    rng = np.random.default_rng(3)
    for shape, rank in (((9, 50), 5), ((17, 7, 3, 3), 33), ((1, 1), 1), ((8, 1000), 0)):
        wide = rng.standard_normal(shape).astype(np.float32)
        value = round_to_bfloat16(wide, np.empty(shape, np.uint16)) if base == np.uint16 else wide.astype(base)
        weight = LowRank(value, rng.standard_normal((shape[0], rank)).astype(np.float32),
                         rng.standard_normal((rank, wide.size // shape[0])).astype(np.float32))
        exact = widened(value) + (weight.up.astype(np.float64) @ weight.down).reshape(shape)
        size = np.abs(exact).max()
        for out, tolerance in ((np.float32, 1e-6), (np.float16, 2**-11), (np.uint16, 2**-8)):
            got = np.empty(shape, out)
            if isa == "numpy":
                weight.into(got)
            else:
                cpp.low_rank(weight.base, weight.up, weight.down, got, isa=isa, threads=2)
            assert np.abs(widened(got) - exact).max() <= tolerance * size * 1.01
    odd = np.array([[np.inf, -np.inf, 3.4e38, -3.4e38, 0.0, -0.0, 1e-40, -1e-45, 1.00390625, 1.01171875]], np.float32)
    got, nan = np.empty(odd.shape, np.uint16), np.empty((1, 2), np.uint16)
    payloads = constant(np.array([[0x7FFFFFFF, 0xFF800001]], np.uint32).view(np.float32))
    for weight, to in ((constant(odd), got), (payloads, nan)):
        if isa == "numpy":
            weight.into(to)
        else:
            cpp.low_rank(weight.base, weight.up, weight.down, to, isa=isa)
    expected = [0x7F80, 0xFF80, 0x7F7F, 0xFF7F, 0, 0x8000, 0x0001, 0x8000, 0x3F80, 0x3F82]
    assert got.tolist() == [expected] and (isa == "numpy" or np.isnan(widened(nan)).all())


@pytest.mark.parametrize(("wrong", "message"), [
    ({"up": np.zeros((3, 2), np.float32)}, r"up: got shape \(3, 2\)"),
    ({"down": np.zeros((2, 7), np.float32)}, "expected 8 values"),
    ({"out": np.zeros((4, 9), np.float32)}, r"out: got shape \(4, 9\)"),
    ({"base": np.zeros((4, 8), np.int32)}, "base: got int32"),
    ({"down": np.zeros((2, 8))}, "down: got float64"),
], ids=["up", "down", "out", "base", "dtype"])
def test_the_kernel_refuses(wrong, message):
    if library.available():
        pytest.skip("no kernels here")
    good = {"base": np.zeros((4, 8), np.float32), "up": np.zeros((4, 2), np.float32),
            "down": np.zeros((2, 8), np.float32), "out": np.zeros((4, 8), np.float32)}
    with pytest.raises(ValueError, match=message):
        cpp.low_rank(**{**good, **wrong})
