"""Checks of a caller's memory, before a backend takes its address."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from engines.spec import EngineError, TensorSpec


def check_names(buffers: Mapping[str, Any], expected: Iterable[str]) -> None:
    """Raise EngineError unless `buffers` has exactly the `expected` names."""
    expected = set(expected)
    if set(buffers) != expected:
        raise EngineError(f"bind: got buffers {sorted(buffers)}, expected exactly {sorted(expected)}")


def check_array(spec: TensorSpec, array: Any) -> None:
    """Raise EngineError unless `array` is a C-contiguous writeable numpy array of `spec`."""
    if not isinstance(array, np.ndarray):
        raise EngineError(f"bind {spec.name}: got {type(array).__name__}, expected a numpy array")
    if array.dtype != np.dtype(spec.dtype) or array.shape != spec.shape:
        raise EngineError(f"bind {spec.name}: got {array.dtype} {list(array.shape)}, "
                          f"expected {spec.dtype} {list(spec.shape)}")
    if not array.flags.c_contiguous or not array.flags.writeable:
        raise EngineError(f"bind {spec.name}: got a view that is not C-contiguous or not writeable; "
                          "pass a fresh array, such as spec.empty()")


def device_address(spec: TensorSpec, buffer: Any) -> int:
    """Return the address of device memory: a number, a cuda.core Buffer, or an array with __cuda_array_interface__.

    Raises EngineError for memory that is too small, or an array of another shape or dtype.
    """
    shape = tuple(int(d) for d in spec.shape)
    if isinstance(buffer, int):
        return buffer
    if array := getattr(buffer, "__cuda_array_interface__", None):
        dtype, sizes = np.dtype(array["typestr"]).name, tuple(array["shape"])
        if (dtype, sizes) != (spec.dtype, shape) or array.get("strides") is not None or array["data"][1]:
            raise EngineError(f"bind {spec.name}: got {dtype} {list(sizes)}, expected contiguous, writeable "
                              f"{spec.dtype} {list(shape)}")
        return int(array["data"][0])
    needed = math.prod(shape) * np.dtype(spec.dtype).itemsize
    if not hasattr(buffer, "handle") or getattr(buffer, "size", 0) < needed:
        raise EngineError(f"bind {spec.name}: got {type(buffer).__name__}, expected device memory of {needed} bytes: "
                          "an address, a cuda.core Buffer or an array with __cuda_array_interface__")
    return int(buffer.handle)
