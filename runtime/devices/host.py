"""This computer as the place where engines run: numpy arrays, and the loop's ops in numpy (`kernels.host.ops`)."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import numpy as np

from engines import Engine
from kernels.host.ops import OPS


class Host:
    """The CPU as a `runtime.devices.device.Device`: whatever is enqueued has run when the call returns."""

    stream = None
    captures = False

    def use(self) -> None:
        pass

    def adopt(self, engine: Engine) -> None:
        pass

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.zeros(shape, dtype)

    def upload(self, target: np.ndarray, source: np.ndarray) -> None:
        target[...] = source

    def copy(self, target: np.ndarray, source: np.ndarray) -> None:
        target[...] = source

    def download(self, source: np.ndarray) -> Callable[[], np.ndarray]:
        copy = source.copy()
        return lambda: copy

    def kernel(self, op: str, **arrays: np.ndarray) -> Callable[[Any], None]:
        enqueue = partial(OPS[op], **arrays)
        return lambda stream: enqueue()

    def run(self, key: Hashable, enqueue: Callable[[Any], None]) -> None:
        enqueue(self.stream)

    def mark(self) -> Callable[[], None]:
        return lambda: None

    def forget(self) -> None:
        pass
