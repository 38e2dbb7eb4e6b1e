"""The noise of `torch.randn` on a CPU generator, in numpy, so that a seed means the same picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_GROUP = 16
_TWO_PI = np.float32(2 * math.pi)


class Generator:
    """`torch.Generator("cpu").manual_seed(seed)`: MT19937 (Matsumoto and Nishimura 1998) and Box–Muller.

    seed: 0 … 2**64 - 1, of which the low 32 bits count, as in torch. Draws continue one another as torch's do.
    Raises ValueError for any other seed.
    """

    def __init__(self, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
            raise ValueError(f"seed: got {seed!r}, expected a whole number from 0 to 2**64 - 1; pass one of those")
        self._bits = np.random.MT19937()
        state: Any = np.random.RandomState(int(seed) & 0xFFFFFFFF).get_state(legacy=False)
        self._bits.state = state
        self._second: float | None = None  # the other half of the last Box–Muller pair of a small draw

    def randn(self, shape: Sequence[int]) -> np.ndarray:
        """Standard normal float32 array: `torch.randn(shape, generator=…)` to a few units in the last place."""
        size = math.prod(shape)
        values = self._many(size) if size >= _GROUP else self._few(size)
        return values.reshape(tuple(shape))

    def _many(self, size: int) -> np.ndarray:
        """Groups of 16; the last 16 values are drawn anew where the size is not a multiple."""
        values = self._uniform(size)
        whole = size - size % _GROUP
        values[:whole] = _box_muller(values[:whole])
        if whole < size:
            values[-_GROUP:] = _box_muller(self._uniform(_GROUP))
        return values

    def _few(self, size: int) -> np.ndarray:
        """Draw one by one in double precision, in pairs whose second half waits for the next small draw."""
        values = np.empty(size, np.float32)
        for i in range(size):
            if self._second is not None:
                values[i], self._second = self._second, None
                continue
            angle, radius = 2 * math.pi * self._double(), math.sqrt(-2 * math.log1p(-self._double()))
            values[i], self._second = radius * math.cos(angle), radius * math.sin(angle)
        return values

    def _uniform(self, size: int) -> np.ndarray:
        """float32 in [0, 1) of 24 random bits each."""
        return (self._bits.random_raw(size) & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    def _double(self) -> float:
        """float64 in [0, 1) of 53 random bits, the high word first."""
        high, low = (int(word) for word in self._bits.random_raw(2))
        return ((high << 32 | low) & (2**53 - 1)) * 2**-53


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    """[16 k] uniform values: in each 16, value j gives the radius and value j + 8 the angle of outputs j and j + 8."""
    pairs = uniform.reshape(-1, 2, _GROUP // 2)
    radius = np.sqrt(-2 * np.log(1 - pairs[:, 0]))
    angle = _TWO_PI * pairs[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()
