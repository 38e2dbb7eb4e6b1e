"""Large pictures pass a VAE of one static shape in overlapping tiles, blended along linear ramps.

The algorithm is that of diffusers' AutoencoderKL.tiled_decode and tiled_encode: tiles overlap by a quarter, each is
blended with the one above it and then with the one to its left. One thing differs: there the last tile of a row or
column has whatever size is left (less than three quarters of the others), here it has the size of all and is moved back
to end at the edge, with a ramp over the whole of its larger overlap. Up to there both give the same.

In memory are the picture, one tile, and strips of its neighbours where they overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

OVERLAP = 0.25
"""Share of a tile that the next one covers too."""

Tile = tuple[int, int]
"""(height, width) of a tile in latents."""
Function = Callable[[np.ndarray], np.ndarray]


def decode(latents: np.ndarray, function: Function, tile: Tile, factor: int) -> np.ndarray:
    """Return the picture, float32 [3, h · factor, w · factor], of latents float32 [C, h, w].

    function: latents [C, *tile] to a picture [3, …], a VAE decoder without the batch. tile: (height, width) in latents.
    factor: pixels a latent. Raises ValueError where a tile is larger than the latents.
    """
    return _tiled(latents.shape[1:], tile, factor,
                  lambda y, x: function(latents[:, y:y + tile[0], x:x + tile[1]]))


def encode(image: np.ndarray, function: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], tile: Tile,
           factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and std of the latents, float32 [C, H / factor, W / factor] each, of a picture float32 [3, H, W].

    function: a picture [3, …] of a tile to mean and std, a VAE encoder without the batch. tile: (height, width) in
    latents. factor: pixels a latent. The logarithm of std is what is blended, as in diffusers, whose encoder gives that
    of the variance. Raises ValueError where a tile is larger than the picture, or a side is no multiple of `factor`.
    """
    height, width = image.shape[1:]
    if height % factor or width % factor:
        raise ValueError(f"picture: got {height}x{width}, expected multiples of {factor}")

    def moments(y: int, x: int) -> np.ndarray:
        y, x = y * factor, x * factor
        mean, std = function(image[:, y:y + tile[0] * factor, x:x + tile[1] * factor])
        return np.concatenate([mean, np.log(std)])

    mean, log_std = np.split(_tiled((height // factor, width // factor), tile, 1, moments), 2)
    return mean, np.exp(log_std)


def starts(size: int, tile: int) -> list[int]:
    """Return where tiles of side `tile` begin that cover `size`; the last of them ends at the edge.

    Raises ValueError for a tile larger than `size`, or too small to overlap.
    """
    if not 4 <= tile <= size:
        raise ValueError(f"tile: got a side of {tile} latents, expected 4 to {size}, the picture's")
    return [*range(0, size - tile, int(tile * (1 - OVERLAP))), size - tile]


def _tiled(size: tuple[int, ...], tile: Tile, scale: int, function: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """Return what `function(y, x)` gives for the tiles of latents of `size` that begin there, [C, …], as one array.

    scale: how many times larger that is than the latents, along each side.
    """
    ys, xs = starts(size[0], tile[0]), starts(size[1], tile[1])
    down, right = ([(first + side - second) * scale for first, second in pairwise(begins)]
                   for begins, side in ((ys, tile[0]), (xs, tile[1])))
    above: list[np.ndarray] = []  # of each column, where the tile of the row before and this one overlap
    out = np.empty(0, np.float32)
    for i, y in enumerate(ys):
        left = np.empty(0, np.float32)
        for j, x in enumerate(xs):
            part = np.array(function(y, x), np.float32)
            if not out.size:
                out = np.empty((len(part), size[0] * scale, size[1] * scale), np.float32)
            if i:
                _ramp(above[j], part[:, :down[i - 1]], axis=1)
            if j:
                _ramp(left, part[:, :, :right[j - 1]], axis=2)
            out[:, y * scale:y * scale + part.shape[1], x * scale:x * scale + part.shape[2]] = part
            if j < len(right):
                left = part[:, :, -right[j]:].copy()
            if i < len(down):
                above[j:j + 1] = [part[:, -down[i]:].copy()]
    return out


def _ramp(before: np.ndarray, after: np.ndarray, axis: int) -> None:
    """Write into `after` the way from `before` to it, along `axis`."""
    count = after.shape[axis]
    shape = [count if n == axis else 1 for n in range(3)]
    share = (np.arange(count, dtype=np.float32) / count).reshape(shape)
    after[...] = before * (1 - share) + after * share
