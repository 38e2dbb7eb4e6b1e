"""bfloat16 in numpy, which lacks it: its bits as uint16, which are the upper half of a float32's."""

from __future__ import annotations

import numpy as np

CHUNK = 1 << 16
"""Values that are rounded at a time, in cache."""


def widened(value: np.ndarray) -> np.ndarray:
    """Return float32 of floating point or bfloat16's bits, which is `value` itself where it is float32."""
    if value.dtype == np.uint16:
        return (value.astype(np.uint32) << 16).view(np.float32)
    return value.astype(np.float32, copy=False)


def rounded(value: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Write the bits of float32 `value` in bfloat16 to `out`, uint16 and contiguous, or to a new array; return it.

    Rounds to nearest even; a value that is finite stays so.
    """
    out = np.empty(value.shape, np.uint16) if out is None else out
    to, bits = out.reshape(-1), np.ascontiguousarray(value).reshape(-1).view(np.uint32)
    for start in range(0, bits.size, CHUNK):
        chunk = bits[start:start + CHUNK]
        nearest = (chunk + np.uint32(0x7FFF) + ((chunk >> 16) & 1)) >> 16
        infinite = (nearest & 0x7F80 == 0x7F80) & (chunk & 0x7F800000 != 0x7F800000)
        to[start:start + CHUNK] = nearest - infinite
    return out
