"""A sampler table, and how `guidance_step` and `step_input` read it: float32 rows of fixed width. Needs numpy only.

One row, for a memory of S arrays (`width(S)` numbers):

    timestep, input_scale, predict x, predict m, clip, draw, signal, sigma,
    mix[0, 0 … S+3], …, mix[S, 0 … S+3]

`draw` is −1 where the row takes no noise, else the number of draws before it. The columns of mix are those of
`runtime.schedulers.Table`: x, p, s1 … sS, noise, m.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

TIMESTEP, INPUT_SCALE, PREDICT_X, PREDICT_M, CLIP, DRAW, SIGNAL, SIGMA, MIX = range(9)
"""Offsets in a row; the mix follows the scalars."""

MEMORIES = (1, 3, 7)
"""Arrays of memory that kernels are built for. With the sample they are 2, 4 or 8, what a Triton tile can hold."""


class SamplerTable(Protocol):
    """What the step reads of a sampler, one row an evaluation; `runtime.schedulers.Table`, which says more, is one."""

    @property
    def timesteps(self) -> np.ndarray: ...
    @property
    def input_scale(self) -> np.ndarray: ...
    @property
    def predict(self) -> np.ndarray: ...
    @property
    def clip(self) -> np.ndarray: ...
    @property
    def mix(self) -> np.ndarray: ...
    @property
    def draws(self) -> np.ndarray: ...
    @property
    def signal(self) -> np.ndarray: ...
    @property
    def sigma(self) -> np.ndarray: ...
    @property
    def init_scale(self) -> float: ...
    @property
    def slots(self) -> int: ...


def width(memory: int) -> int:
    """Return how many numbers one row of a table for `memory` arrays of memory has."""
    return MIX + (1 + memory) * (memory + 4)


def fitting_memory(slots: int) -> int:
    """Return the smallest of `MEMORIES` that holds `slots` arrays. Raises ValueError where none does."""
    for memory in MEMORIES:
        if slots <= memory:
            return memory
    raise ValueError(f"sampler table: got {slots} arrays of memory, expected at most {MEMORIES[-1]}; "
                     "use a solver of lower order")


def pack(table: SamplerTable, memory: int, rows: int = 0) -> np.ndarray:
    """Return `table` as float32 [max(rows, its own), width(memory)].

    memory: arrays of memory of the batch; the ones that the solver does not have stay zero. rows: rows of the batch's
    device table; the ones after the last are zero and never run. Raises ValueError for a solver with more memory.
    """
    n, states = table.mix.shape[:2]
    slots = table.slots
    if slots > memory:
        raise ValueError(f"sampler table: got {slots} arrays of memory, expected at most {memory}; give the batch the "
                         f"memory of its largest table, {fitting_memory(slots)} (fitting_memory)")
    packed = np.zeros((max(n, rows), width(memory)), np.float32)
    used = packed[:n]
    draws = np.where(table.draws, np.cumsum(table.draws) - 1, -1)
    columns = (table.timesteps, table.input_scale, table.predict[:, 0], table.predict[:, 1], table.clip, draws,
               table.signal, table.sigma)
    used[:, :MIX] = np.stack(columns, axis=1)
    mix = used[:, MIX:].reshape(n, 1 + memory, memory + 4)
    mix[:, :states, :2 + slots] = table.mix[:, :, :2 + slots]
    mix[:, :states, -2:] = table.mix[:, :, -2:]
    return packed


def pack_times(times: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the inputs that depend on the timestep, [rows, …] each, side by side: float32 [rows, numbers]."""
    return np.concatenate([np.asarray(a, np.float32).reshape(len(a), -1) for a in times.values()], axis=1)


def time_columns(widths: Mapping[str, int], offsets: Mapping[str, int]) -> np.ndarray:
    """Return int32 [inputs, 3]: where each input begins in a row of `pack_times`, where in the arena, and its width.

    widths: numbers in one row of each input, in the order of `pack_times`. offsets: float32 numbers before it in the
    arena.
    """
    starts = np.cumsum([0, *widths.values()])
    return np.array([(start, offsets[name], width) for start, (name, width) in
                     zip(starts[:-1], widths.items(), strict=True)], np.int32).reshape(-1, 3)
