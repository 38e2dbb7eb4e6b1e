"""This machine's NVIDIA GPUs, asked of the CUDA driver itself, so that no package is needed."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.spec import Engine, EngineError

DRIVER = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class Gpu:
    """One GPU: the name that its driver gives, its architecture ("sm_89"), and the driver's version."""

    name: str
    arch: str
    driver: str


def gpus() -> list[Gpu]:
    """The GPUs by number; empty without a driver."""
    try:
        driver = _Driver()
        count = ctypes.c_int()
        driver.cuDeviceGetCount(ctypes.byref(count))
        return [_describe(driver, number) for number in range(count.value)]
    except (OSError, EngineError):
        return []


def select(number: int) -> None:
    """Make GPU `number` the one that CUDA calls of this thread go to."""
    _select(_Driver(), number)


def run(engine: Engine, number: int, feed: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray],
        again: Callable[[Callable[[], None]], object] | None = None) -> None:
    """Run an engine of GPU `number` once on arrays of this host; writes the results into `outputs`.

    again: is then handed a function that runs it on the same arrays and waits, to be called as often as it likes.
    """
    driver = _Driver()
    _select(driver, number)
    with contextlib.ExitStack() as stack:
        addresses = {}
        for name, array in {**feed, **outputs}.items():
            addresses[name] = stack.enter_context(_allocated(driver, array.nbytes))
            driver.cuMemcpyHtoD_v2(ctypes.c_uint64(addresses[name]), _pointer(array), ctypes.c_size_t(array.nbytes))

        def call() -> None:
            engine.enqueue()
            driver.cuCtxSynchronize()

        engine.bind(addresses)
        call()
        if again is not None:
            again(call)
        for name, array in outputs.items():
            driver.cuMemcpyDtoH_v2(_pointer(array), ctypes.c_uint64(addresses[name]), ctypes.c_size_t(array.nbytes))


class _Driver:
    """libcuda, started; a call whose status is not zero raises EngineError."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(DRIVER)
        self.cuInit(0)

    def __getattr__(self, name: str) -> _Call:
        return _Call(getattr(self._library, name), name)


@dataclass(frozen=True)
class _Call:
    function: ctypes._NamedFuncPointer
    name: str

    def __call__(self, *arguments: object) -> None:
        if status := self.function(*arguments):
            raise EngineError(f"CUDA driver: {self.name} gave status {status}, expected 0; see nvidia-smi")


def _select(driver: _Driver, number: int) -> None:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    driver.cuDeviceGet(ctypes.byref(device), number)
    driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)  # the one that the CUDA runtime uses; it stays
    driver.cuCtxSetCurrent(context)


def _describe(driver: _Driver, number: int) -> Gpu:
    device, name, major, minor = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), number)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    version = Path("/proc/driver/nvidia/version")
    text = version.read_text().splitlines()[0] if version.is_file() else "unknown"
    return Gpu(name.value.decode(), f"sm_{major.value}{minor.value}", text)


@contextlib.contextmanager
def _allocated(driver: _Driver, size: int) -> Iterator[int]:
    address = ctypes.c_uint64()
    driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size))
    try:
        yield address.value
    finally:
        driver.cuMemFree_v2(address)


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
