"""The noise generator against torch.randn of a CPU generator."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from runtime.loop.noise import Generator
from tests.tolerances import NOISE_ABS

SEEDS = (0, 1, 42, 2**32 - 1, 2**32 + 5, 2**63, 2**64 - 1)
SHAPES = ((1,), (5,), (15,), (16,), (17,), (31,), (32,), (100,), (1, 4, 8, 12), (2, 4, 64, 64), (), (0,))


def difference(ours: Generator, truth: torch.Generator, shape: tuple[int, ...]) -> float:
    expected = torch.randn(shape, generator=truth).numpy()
    got = ours.randn(shape)
    assert got.shape == expected.shape
    assert got.dtype == np.float32
    return float(np.abs(got - expected).max(initial=0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_one_draw(seed: int, shape: tuple[int, ...]) -> None:
    assert difference(Generator(seed), torch.Generator("cpu").manual_seed(seed), shape) <= NOISE_ABS


@pytest.mark.parametrize("sizes", [
    (4096, 4096, 4096),
    (1, 1, 1, 1),  # the second half of a pair waits for the next draw
    (3, 16, 2, 17, 1),  # and through draws of the other kind
    (15, 15, 100, 5, 33, 0, 7),
], ids=str)
@pytest.mark.parametrize("seed", [0, 7])
def test_consecutive_draws(seed: int, sizes: tuple[int, ...]) -> None:
    ours, truth = Generator(seed), torch.Generator("cpu").manual_seed(seed)
    for size in sizes:
        assert difference(ours, truth, (size,)) <= NOISE_ABS


def test_random_sequences_of_draws() -> None:
    sizes = np.random.default_rng(5).integers(0, 40, 300)
    ours, truth = Generator(11), torch.Generator("cpu").manual_seed(11)
    assert max(difference(ours, truth, (int(size),)) for size in sizes) <= NOISE_ABS


def test_seeds_are_told_apart() -> None:
    draws = [Generator(seed).randn((64,)) for seed in (0, 1, 2)]
    assert np.abs(draws[0] - draws[1]).max() > 0.1
    assert np.abs(draws[1] - draws[2]).max() > 0.1


def test_numpy_seed() -> None:
    np.testing.assert_array_equal(Generator(np.int64(3)).randn((20,)), Generator(3).randn((20,)))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "1", None], ids=repr)
def test_refused_seeds(seed: Any) -> None:
    with pytest.raises(ValueError, match=r"seed: got .* expected a whole number from 0 to 2\*\*64 - 1"):
        Generator(seed)


def test_a_latent_takes_well_under_5_ms() -> None:
    generator, best = Generator(0), float("inf")
    for _ in range(10):
        start = time.perf_counter()
        generator.randn((4, 64, 64))
        best = min(best, time.perf_counter() - start)
    assert best < 0.005
