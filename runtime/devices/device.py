"""The loop asks this of the place of its engines and buffers: a GPU (`cuda.py`), or this computer (`host.py`)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol

import numpy as np

from engines import Engine


class Device(Protocol):
    """A device is the place where engines run, as the loop sees it. Work runs in the order in which it is enqueued.

    stream: what engines enqueue on. captures: whether work that repeats is captured in graphs. asynchronous: whether
    what is enqueued may run after the call has returned.
    """

    stream: Any
    captures: bool
    asynchronous: bool

    def use(self) -> None:
        """Make it the one of the calling thread."""

    def adopt(self, engine: Engine) -> None:
        """Give an engine what it shares with the others that run here; before its buffers are bound."""

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array that stays where it is; numpy's indexing by leading dimension, `view`, `reshape`, `shape`."""

    def upload(self, target: Any, source: np.ndarray) -> None:
        """Enqueue a copy; `source` may change as soon as this returns."""

    def copy(self, target: Any, source: Any) -> None:
        """Enqueue a copy between two arrays of the device, of one shape and dtype."""

    def download(self, source: Any) -> Callable[[], np.ndarray]:
        """Enqueue a copy; the function that comes back waits for it and returns it."""

    def kernel(self, op: str, **arrays: Any) -> Callable[[Any], None]:
        """Return one of `kernels.calls.OPS` on these arrays: a function of a stream that enqueues it."""

    def run(self, key: Hashable, enqueue: Callable[[Any], None]) -> None:
        """Enqueue `enqueue(stream)`, from a graph of this key where there is one."""

    def mark(self) -> Callable[[], None]:
        """A function that waits for all that was enqueued until now."""

    def forget(self) -> None:
        """Drop the graphs: something that they hold has changed."""


def signature(arrays: Mapping[str, Any]) -> Hashable:
    """Names, shapes, dtypes and addresses: what a graph that reads or writes these arrays depends on."""
    return tuple((name, a.shape, a.dtype.name, _address(a)) for name, a in sorted(arrays.items()))


def _address(array: Any) -> int:
    return array.ctypes.data if isinstance(array, np.ndarray) else int(array)
