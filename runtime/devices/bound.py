"""An engine together with the memory it reads and writes, allocated once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from engines import Engine, TensorSpec
from engines.onnx.low_rank import Weight
from runtime.devices.device import Device, signature
from runtime.devices.host import Host

ALIGNMENT = 256
"""Bytes; what TensorRT wants of every address."""


class BoundEngine:
    """`engine` bound to `buffers`: arrays of its device by tensor name, zero at first, whose addresses never change.

    They lie in one block of float32 numbers, `arena`, `offsets[name]` numbers from its start.
    """

    def __init__(self, engine: Engine, device: Device | None = None) -> None:
        self.engine = engine
        self.device = device or Host()
        specs = {**engine.inputs, **engine.outputs}
        self.offsets, size = layout(specs.values())
        self.arena = self.device.zeros((size,), np.float32)
        self.buffers: dict[str, Any] = {}
        for name, spec in specs.items():
            numbers = -(-_bytes(spec) // 4)
            part = self.arena[self.offsets[name]:self.offsets[name] + numbers]
            whole = part.view(np.uint8)[:_bytes(spec)].view(np.dtype(spec.dtype))
            self.buffers[name] = whole.reshape(tuple(int(d) for d in spec.shape))
        self.device.adopt(engine)
        engine.bind(self.buffers)
        self.key = (engine, signature(self.buffers))  # an engine that is in a graph is not taken for a later one

    def group(self, group: str) -> list[str]:
        """Return the names of the tensors of a group, in order; empty where the engine has none."""
        return [name for name, spec in {**self.engine.inputs, **self.engine.outputs}.items() if spec.group == group]

    def block(self, group: str) -> Any:
        """Return the memory of all tensors of a group, flat: they lie one after another, at ALIGNMENT."""
        names = self.group(group)
        end = self.offsets[names[-1]] + math.prod(self.buffers[names[-1]].shape)
        return self.arena[self.offsets[names[0]]:end]

    def enqueue(self, stream: Any) -> None:
        self.engine.enqueue(stream)

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Copy `inputs` in, run, and return what came out."""
        self.device.use()
        for name, value in inputs.items():
            self.device.upload(self.buffers[name], value)
        self.device.run(self.key, self.enqueue)
        waiting = {name: self.device.download(self.buffers[name]) for name in self.engine.outputs}
        return {name: wait() for name, wait in waiting.items()}

    def refit(self, weights: Mapping[str, Weight]) -> None:
        """`engine.refit`, after everything that runs; graphs that hold the engine are captured anew."""
        self.device.use()
        self.device.mark()()
        self.engine.refit(weights)
        self.device.forget()


def layout(specs: Iterable[TensorSpec]) -> tuple[dict[str, int], int]:
    """Return where each of the resolved `specs` begins in one block, and its size, both in float32 numbers."""
    offsets, end = {}, 0
    for spec in specs:
        offsets[spec.name] = end // 4
        end += -(-_bytes(spec) // ALIGNMENT) * ALIGNMENT
    return offsets, end // 4


def _bytes(spec: TensorSpec) -> int:
    return math.prod(int(d) for d in spec.shape) * np.dtype(spec.dtype).itemsize
