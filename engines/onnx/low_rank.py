"""A weight with a change of low rank, computed where it is needed: what a refit for LoRAs is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kernels.cpu import cpp, library

CHUNK = 1 << 16
"""Values that are rounded at a time, in cache."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """base + up · down, a float32 array to whoever asks for one (`numpy.asarray`).

    base: float32, float16, or the bits of bfloat16 as uint16, [m, …], C-contiguous. up: float32 [m, r]. down: float32
    [r, n], n the product of the other sizes of base; r may be 0.
    """

    base: np.ndarray
    up: np.ndarray
    down: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32)

    def __len__(self) -> int:
        return len(self.base)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a weight of low rank: got copy=False, expected a copy; its values are computed")
        return self.into(np.empty(self.shape, np.float32)).astype(dtype or np.float32, copy=False)

    def rows(self, start: int, stop: int) -> LowRank:
        """Those rows of it."""
        return LowRank(self.base[start:stop], self.up[start:stop], self.down)

    def into(self, out: np.ndarray) -> np.ndarray:
        """Write it to `out`, float32, float16, or uint16 for bfloat16, rounded once, to nearest even; returns `out`."""
        if not out.size:
            return out
        if library.available() is None:
            matrix = (len(self.up), self.down.shape[1])
            cpp.low_rank(self.base.reshape(matrix), self.up, self.down, out.reshape(matrix))
            return out
        wide = widened(self.base)
        if len(self.down):
            wide = wide + (self.up @ self.down).reshape(self.shape)
        if out.dtype == np.uint16:
            return round_to_bfloat16(wide, out)
        out[...] = wide
        return out


Weight = np.ndarray | LowRank
"""What an engine can be refitted with."""


def constant(value: np.ndarray) -> LowRank:
    """`value`, floating point or bfloat16's bits, without a change."""
    value = np.asarray(value, np.float32 if value.dtype == np.float64 else None, order="C")
    rows = value.shape[0] if value.ndim else 1
    return LowRank(value, np.empty((rows, 0), np.float32), np.empty((0, value.size // max(rows, 1)), np.float32))


def widened(value: np.ndarray) -> np.ndarray:
    """float32 of floating point or bfloat16's bits."""
    if value.dtype == np.uint16:
        return (value.astype(np.uint32) << 16).view(np.float32)
    return value.astype(np.float32, copy=False)


def round_to_bfloat16(value: np.ndarray, out: np.ndarray) -> np.ndarray:
    """The bits of float32 `value` in bfloat16, to nearest even; what is finite stays so. Returns `out`, uint16."""
    to, bits = out.reshape(-1), np.ascontiguousarray(value).reshape(-1).view(np.uint32)
    for start in range(0, bits.size, CHUNK):
        chunk = bits[start:start + CHUNK]
        rounded = (chunk + np.uint32(0x7FFF) + ((chunk >> 16) & 1)) >> 16
        infinite = (rounded & 0x7F80 == 0x7F80) & (chunk & 0x7F800000 != 0x7F800000)
        to[start:start + CHUNK] = rounded - infinite
    return out
