"""Sampler tables and time inputs packed as the kernels read them."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.host.step_table import DRAW, MIX, fitting_memory, pack, pack_times, time_columns, width
from runtime.schedulers import make_table
from tests.runtime.schedulers.test_schedulers import STABLE


def test_pack_puts_every_number_where_the_kernel_looks() -> None:
    table = make_table(STABLE, 4, scheduler="dpm++_2m_sde")
    packed = pack(table, 3, 9)
    assert packed.shape == (9, width(3)) == (9, MIX + 4 * 7)
    assert not packed[table.rows:].any()
    scalars = [table.timesteps[2], table.input_scale[2], *table.predict[2], table.clip[2], 2, table.signal[2],
               table.sigma[2]]
    np.testing.assert_array_equal(packed[2, :MIX], np.array(scalars, np.float32))
    mix = packed[2, MIX:].reshape(4, 7)  # columns x, p, s1, s2, s3, noise, m
    np.testing.assert_array_equal(mix[:2][:, [0, 1, 2, 5, 6]], table.mix[2].astype(np.float32))
    assert not mix[2:].any()
    assert not mix[:, 3:5].any()


def test_pack_counts_the_draws_before_a_row() -> None:
    table = make_table(STABLE, 4, scheduler="lcm")
    assert table.draws.tolist() == [True, True, True, False]
    assert pack(table, 1)[:, DRAW].tolist() == [0, 1, 2, -1]


def test_memory_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got 3 arrays of memory, expected at most 1; give the batch .* 3"):
        pack(make_table(STABLE, 4, scheduler="lms"), 1)
    with pytest.raises(ValueError, match="got 8 arrays of memory, expected at most 7"):
        fitting_memory(8)


def test_time_inputs_come_back_as_they_were_packed() -> None:
    rng = np.random.default_rng(0)
    times = {"timestep": np.arange(3), "a": rng.standard_normal((3, 5, 2)), "b": rng.standard_normal((3, 4))}
    packed = pack_times(times)
    widths = {"timestep": 1, "a": 10, "b": 4}
    assert packed.shape == (3, 15) and packed.dtype == np.float32
    for name, (start, offset, size) in zip(times, time_columns(widths, dict.fromkeys(widths, 64)), strict=True):
        assert offset == 64
        np.testing.assert_array_equal(packed[:, start:start + size], times[name].reshape(3, -1).astype(np.float32))
