"""Guidance against diffusers' formulas, and the executor of table rows against the table's own words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from kernels.host.step import advance, guide, initial_state
from runtime.schedulers import Table

SHAPE = (4, 6, 5)


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_table(slots: int, clip: float = 0.0, draws: bool = True) -> Table:
    """Two rows of arbitrary coefficients."""
    rng = np.random.default_rng(slots)
    return Table(timesteps=np.array([9.0, 4.0]), input_scale=np.ones(2), predict=rng.standard_normal((2, 2)),
                 clip=np.full(2, clip), mix=rng.standard_normal((2, 1 + slots, slots + 4)),
                 draws=np.array([draws, False]), signal=np.ones(2), sigma=np.ones(2), init_scale=3.5)


@pytest.mark.parametrize("rescale", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 7.5, 30.0])
def test_guidance_matches_diffusers(guidance: float, rescale: float) -> None:
    uncond, cond = random(1, *SHAPE), random(2, *SHAPE) * 1.7 + 0.2
    u, c = torch.from_numpy(uncond)[None], torch.from_numpy(cond)[None]
    expected = u + guidance * (c - u)
    if rescale:
        expected = rescale_noise_cfg(expected, c, guidance_rescale=rescale)
    got = guide(uncond, cond, guidance, rescale)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected.numpy()[0], rtol=1e-6, atol=1e-5)


def test_guidance_leaves_its_inputs_alone() -> None:
    uncond, cond = random(1, *SHAPE), random(2, *SHAPE)
    guide(uncond, cond, 7.5, 0.7)
    np.testing.assert_array_equal(uncond, random(1, *SHAPE))
    np.testing.assert_array_equal(cond, random(2, *SHAPE))


@pytest.mark.parametrize("clip", [0.0, 0.4], ids=["free", "clipped"])
@pytest.mark.parametrize("slots", [0, 1, 5])
def test_advance_does_what_table_says(slots: int, clip: float) -> None:
    table = random_table(slots, clip)
    state, m, noise = random(3, 1 + slots, *SHAPE), random(4, *SHAPE), random(5, *SHAPE)
    x = state[0].astype(np.float64)
    p = table.predict[0, 0] * x + table.predict[0, 1] * m
    if clip:
        assert np.abs(p).max() > clip
        p = p.clip(-clip, clip)
    expected = np.tensordot(table.mix[0], np.stack([x, p, *state[1:], noise, m]), 1)
    before = state
    advance(state, m, noise, table, 0)
    assert state is before
    assert state.dtype == np.float32
    np.testing.assert_allclose(state, expected, rtol=1e-5, atol=1e-5)


def test_advance_in_a_slot_of_a_batch() -> None:
    """The state of one image inside a larger buffer is updated in place, and its neighbours are not."""
    table = random_table(2, draws=False)
    batch = random(6, 3, 3, *SHAPE)
    alone, m = batch[1].copy(), random(7, *SHAPE)
    untouched = batch[[0, 2]].copy()
    advance(batch[1], m, None, table, 0)
    advance(alone, m, None, table, 0)
    np.testing.assert_array_equal(batch[1], alone)
    np.testing.assert_array_equal(batch[[0, 2]], untouched)


def test_noise_is_given_exactly_where_it_is_drawn() -> None:
    table, m = random_table(0), random(4, *SHAPE)
    state = initial_state(table, random(3, *SHAPE))
    with pytest.raises(ValueError, match="noise: got none for row 0, expected True"):
        advance(state, m, None, table, 0)
    with pytest.raises(ValueError, match="noise: got some for row 1, expected False"):
        advance(state, m, m, table, 1)


def test_a_state_that_numpy_would_copy_is_refused() -> None:
    table = random_table(0, draws=False)
    state = random(3, 1, 4, 5, 6).transpose(0, 1, 3, 2)
    with pytest.raises(ValueError, match="state: got an array that is not contiguous"):
        advance(state, random(4, *SHAPE), None, table, 0)


def test_initial_state_scales_the_noise_and_remembers_nothing() -> None:
    noise = random(8, *SHAPE)
    state = initial_state(random_table(3), noise)
    assert state.shape == (4, *SHAPE)
    assert state.dtype == np.float32
    np.testing.assert_array_equal(state[0], noise * np.float32(3.5))
    assert not state[1:].any()
