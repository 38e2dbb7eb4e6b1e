"""What the loop launches on a GPU, in numpy: the ops of `kernels.calls.OPS`, by the same names and arguments."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels.host import step_table
from kernels.host.step import guide, update


def step_input(state: np.ndarray, table: np.ndarray, progress: np.ndarray, times: np.ndarray, columns: np.ndarray,
               sample: np.ndarray, arena: np.ndarray) -> None:
    """`kernels.triton.step_input` in numpy; shapes and dtypes are those of its torch operator."""
    images = len(state)
    first = len(sample) - images
    for b, (i, rows, _) in enumerate(progress):
        if i >= rows:
            continue
        np.multiply(state[b, 0], table[b, i, step_table.INPUT_SCALE], out=sample[first + b])
        sample[b] = sample[first + b]
        for start, offset, width in columns:
            for row in (b, first + b):
                arena[offset + row * width:][:width] = times[b, i, start:start + width]


def accumulate(x: np.ndarray, keep: np.ndarray, out: np.ndarray) -> None:
    """`kernels.triton.accumulate` in numpy; shapes and dtypes are those of its torch operator."""
    if keep[0]:
        out += x
    else:
        out[...] = x


def guidance_step(noise_pred: np.ndarray, noise: np.ndarray, table: np.ndarray, controls: np.ndarray,
                  known: np.ndarray, state: np.ndarray, sample: np.ndarray, timestep: np.ndarray,
                  progress: np.ndarray) -> None:
    """`kernels.triton.guidance_step` in numpy; shapes and dtypes are those of its torch operator.

    It leaves the next input (`sample`, `timestep`) to `step_input`, with which every step begins.
    """
    images, states = state.shape[:2]
    first = len(noise_pred) - images
    for b, (i, rows, _) in enumerate(progress):
        if i >= rows:
            continue
        guidance, rescale, blend = (float(value) for value in controls[b])
        m = noise_pred[first + b]
        if guidance != 1:
            m = guide(noise_pred[b], m, guidance, rescale)
        row = table[b, i]
        draw = int(row[step_table.DRAW])
        update(state[b], m, None if draw < 0 else noise[b, draw % noise.shape[1]],
               row[[step_table.PREDICT_X, step_table.PREDICT_M]], float(row[step_table.CLIP]),
               row[step_table.MIX:].reshape(states, states + 3))
        if blend:
            x0, known_noise, keep = known[b]
            level = row[step_table.SIGNAL] * x0 + row[step_table.SIGMA] * known_noise
            state[b, 0] = keep * level + (1 - keep) * state[b, 0]
        progress[b, 0] += 1


def to_image(x: np.ndarray, out: np.ndarray) -> None:
    """`kernels.triton.to_image` in numpy: float32 [images, 3, height, width] to uint8 [images, height, width, 3]."""
    unit = np.nan_to_num((x * np.float32(0.5) + np.float32(0.5)).clip(0, 1), copy=False)
    out[...] = np.rint(unit.transpose(0, 2, 3, 1) * 255.0).astype(np.uint8)


OPS: dict[str, Callable[..., None]] = {
    "step_input": step_input, "accumulate": accumulate, "guidance_step": guidance_step, "to_image": to_image}
