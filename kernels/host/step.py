"""A denoising step of one image, in numpy, is guidance and then a row of a sampler table."""

from __future__ import annotations

import numpy as np

from kernels.host.step_table import SamplerTable


def guide(uncond: np.ndarray, cond: np.ndarray, guidance: float, rescale: float = 0.0) -> np.ndarray:
    """Return uncond + guidance * (cond - uncond), float32 [C, h, w]: classifier-free guidance (arXiv 2207.12598).

    rescale: share, 0 to 1, of that output brought to the standard deviation of `cond` over the whole image
    (arXiv 2305.08891 §3.4, unbiased deviations as diffusers takes them).
    """
    guided = cond - uncond
    guided *= np.float32(guidance)
    guided += uncond
    if rescale:
        ratio = cond.std(ddof=1, dtype=np.float64) / guided.std(ddof=1, dtype=np.float64)
        guided *= np.float32(rescale * ratio + (1 - rescale))
    return guided


def initial_state(table: SamplerTable, noise: np.ndarray) -> np.ndarray:
    """Return the state before row 0, float32 [1 + slots, C, h, w]: `noise` at the level of that row, and no memory.

    noise: float32 [C, h, w], unit variance.
    """
    state = np.zeros((1 + table.slots, *noise.shape), np.float32)
    np.multiply(noise, np.float32(table.init_scale), out=state[0])
    return state


def advance(state: np.ndarray, m: np.ndarray, noise: np.ndarray | None, table: SamplerTable, i: int) -> None:
    """Apply row i of `table` to `state` in place.

    state: float32 [1 + slots, C, h, w], contiguous. m: guided model output, float32 [C, h, w]. noise: float32 [C, h,
    w], unit variance, exactly where table.draws[i]. Raises ValueError where noise is missing or not wanted, and for a
    state that is not contiguous.
    """
    if not state.flags.c_contiguous:
        raise ValueError(f"state: got an array that is not contiguous, with strides {state.strides}, expected one that "
                         "can be updated in place; make it with initial_state")
    if (noise is not None) != table.draws[i]:
        raise ValueError(f"noise: got {'none' if noise is None else 'some'} for row {i}, expected {table.draws[i]!s} "
                         "of table.draws; draw one randn exactly for the rows that draw")
    update(state, m, noise, table.predict[i], float(table.clip[i]), table.mix[i])


def update(state: np.ndarray, m: np.ndarray, noise: np.ndarray | None, predict: np.ndarray, clip: float,
           mix: np.ndarray) -> None:
    """Do what `advance` does, unchecked, by the numbers of a row in any float dtype.

    predict: [2]. mix: [1 + slots, slots + 4].
    """
    slots = len(state) - 1
    columns = np.empty((slots + 4, m.size), np.float32)  # x, p, memory, noise, m: the order of the mix
    columns[0] = state[0].ravel()
    columns[-1] = m.ravel()
    of_x, of_m = predict.astype(np.float32)
    np.multiply(columns[-1], of_m, out=columns[1])
    columns[1] += of_x * columns[0]
    if clip > 0:
        np.clip(columns[1], -clip, clip, out=columns[1])
    columns[2:2 + slots] = state[1:].reshape(slots, m.size)
    columns[-2] = 0 if noise is None else noise.ravel()
    np.matmul(mix.astype(np.float32), columns, out=state.reshape(1 + slots, m.size))
