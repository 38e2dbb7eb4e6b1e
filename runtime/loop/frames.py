"""Frames of a video hand on to those that follow: inputs of the UNet's self-attention, by layer and step."""

from __future__ import annotations

import math
from typing import Any

from runtime.devices.bound import BoundEngine

FIRST, PREVIOUS, HIDDEN = "first", "previous", "hidden"
"""Groups of tensors: what the layers of the first frame and of the frame before were given, and those of this one."""


class Memory:
    """The memory is of a video's first frame and of the frame before, for every step of `steps`; where the engine runs.

    A frame reads what the frame before wrote at that step, and then writes its own in its place, so the frames of a
    video may be in a batch together, each a step behind the one before it. Two blocks of float32 [steps, 2, numbers],
    the row of the negative prompt first: for Stable Diffusion 1.5 at 512x512 55 MB a step each.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._blocks: dict[str, Any] = {}

    def read(self, unet: BoundEngine, rows: tuple[int, int], step: int) -> None:
        """Give `unet` what it is to know of other frames. rows: of an image, negative prompt first."""
        for group in (FIRST, PREVIOUS):
            for target, source in self._pairs(unet, group, rows, self._block(unet, group), step):
                unet.device.copy(target, source)

    def write(self, unet: BoundEngine, rows: tuple[int, int], step: int, first: bool) -> None:
        """Keep what `unet` found. first: whether this is the first frame."""
        for group in (FIRST, PREVIOUS) if first else (PREVIOUS,):
            for source, target in self._pairs(unet, HIDDEN, rows, self._block(unet, group), step):
                unet.device.copy(target, source)

    def _block(self, unet: BoundEngine, group: str) -> Any:
        if group not in self._blocks:
            numbers = sum(math.prod(unet.buffers[name].shape[1:]) for name in unet.group(HIDDEN))
            self._blocks[group] = unet.device.zeros((self._steps, 2, numbers), "float32")
        return self._blocks[group]

    def _pairs(self, unet: BoundEngine, group: str, rows: tuple[int, int], block: Any,
               step: int) -> list[tuple[Any, Any]]:
        """Return the rows of the engine's buffers of this group, and where each is in a block."""
        pairs, start = [], 0
        for name in unet.group(group):
            shape = unet.buffers[name].shape
            end = start + math.prod(shape[1:])
            for half, row in enumerate(rows):
                if half or rows[0] != rows[1]:  # without guidance there is one row only, the positive one
                    pairs.append((unet.buffers[name][row], block[step][half][start:end].reshape(shape[1:])))
            start = end
        return pairs
