"""This machine's NVIDIA GPUs, through the CUDA driver itself, so that no package is needed."""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.backend import Engine
from engines.spec import EngineError

DRIVER = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING


@dataclass(frozen=True)
class Gpu:
    """A GPU has the name that its driver gives, an architecture ("sm_89"), and the driver's version."""

    name: str
    arch: str
    driver: str


def gpus() -> list[Gpu]:
    """Return the GPUs by number; empty without a driver."""
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
    """Run an engine of GPU `number` once on arrays of this host, and write the results into `outputs`.

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


def seconds(number: int, enqueue: Callable[[int], None], runs: int) -> float:
    """Return the time of one of `runs` that `enqueue` puts on a stream of GPU `number` in turn, by CUDA events."""
    driver = _Driver()
    _select(driver, number)
    stream, start, end, time = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_float()
    with contextlib.ExitStack() as stack:
        driver.cuStreamCreate(ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
        stack.callback(driver.cuStreamDestroy_v2, stream)
        for event in (start, end):
            driver.cuEventCreate(ctypes.byref(event), ctypes.c_uint(0))
            stack.callback(driver.cuEventDestroy_v2, event)
        driver.cuEventRecord(start, stream)
        for _ in range(runs):
            enqueue(stream.value or 0)
        driver.cuEventRecord(end, stream)
        driver.cuEventSynchronize(end)
        driver.cuEventElapsedTime(ctypes.byref(time), start, end)
    return time.value / 1000 / runs


@contextlib.contextmanager
def on_device(number: int, array: np.ndarray) -> Iterator[int]:
    """Yield the address of a copy of `array` in the memory of GPU `number`, freed at the end."""
    driver = _Driver()
    _select(driver, number)
    with _allocated(driver, array.nbytes) as address:
        driver.cuMemcpyHtoD_v2(ctypes.c_uint64(address), _pointer(array), ctypes.c_size_t(array.nbytes))
        yield address


def read(number: int, address: int, like: np.ndarray) -> np.ndarray:
    """Return an array of the shape and dtype of `like`, copied from the memory of GPU `number`."""
    driver = _Driver()
    _select(driver, number)
    array = np.empty_like(like)
    driver.cuMemcpyDtoH_v2(_pointer(array), ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes))
    return array


class Memory:
    """A block of memory of GPU `number`, freed with the object. handle: its address. size: in bytes."""

    def __init__(self, number: int, size: int) -> None:
        driver = _Driver()
        _select(driver, number)
        address = ctypes.c_uint64()
        driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size))
        self.handle, self.size = address.value, size
        weakref.finalize(self, _free, driver, number, address)


def _free(driver: _Driver, number: int, address: ctypes.c_uint64) -> None:
    _select(driver, number)  # of the thread that happens to drop the last reference
    driver.cuMemFree_v2(address)


class _Driver:
    """The CUDA driver's library, started; a call whose status is not zero raises EngineError."""

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
