"""A GPU as the place where engines run and the loop's buffers are, through cuda.core."""

from __future__ import annotations

import ctypes
import math
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engines import Engine, EngineError
from kernels import calls
from kernels.aot.artefact import Artefact, KernelError, arch_for
from kernels.launch import Kernel, cuda_core
from runtime.devices.graphs import Graphs

SMALLEST_BLOCK, SLAB_BLOCKS, SLAB_BYTES = 256, 32, 8 << 20
"""Blocks of page-locked memory are powers of two from 256 bytes; so many are allocated together, or fewer of 8 MiB."""


class Array:
    """Contiguous memory of a GPU: numpy's shape and dtype, no arithmetic.

    torch and cupy read it through `__cuda_array_interface__`. buffer: the cuda.core Buffer that it lies in, which has
    DLPack of its bytes.
    """

    def __init__(self, buffer: Any, address: int, shape: tuple[int, ...], dtype: Any) -> None:
        self.buffer = buffer
        self.address = address
        self.shape = shape
        self.dtype = np.dtype(dtype)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (self.address, False), "strides": None,
                "version": 3}

    def __int__(self) -> int:
        return self.address

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> Array:
        step = math.prod(self.shape[1:]) * self.dtype.itemsize
        if isinstance(index, slice):
            start, stop, stride = index.indices(len(self))
            if stride != 1:
                raise IndexError(f"got a step of {stride}, expected 1: an array of a GPU is contiguous")
            return Array(self.buffer, self.address + start * step, (max(0, stop - start), *self.shape[1:]), self.dtype)
        if not -len(self) <= index < len(self):
            raise IndexError(f"got index {index}, expected less than {len(self)}")
        return Array(self.buffer, self.address + index % len(self) * step, self.shape[1:], self.dtype)

    def reshape(self, shape: tuple[int, ...]) -> Array:
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"got shape {shape}, expected {math.prod(self.shape)} numbers as in {self.shape}")
        return Array(self.buffer, self.address, shape, self.dtype)

    def view(self, dtype: Any) -> Array:
        """The same bytes as another dtype; the last dimension changes."""
        size = np.dtype(dtype).itemsize
        last = self.shape[-1] * self.dtype.itemsize
        if last % size:
            raise ValueError(f"got rows of {last} bytes, expected a multiple of {size}")
        return Array(self.buffer, self.address, (*self.shape[:-1], last // size), dtype)


class Cuda:
    """GPU `number` as a `Device`: one stream, on which everything runs in order.

    kernels: the directory of the artefacts of `kernels.calls.OPS`. eager: no CUDA graphs. Raises KernelError where
    cuda.core is missing.
    """

    asynchronous = True

    def __init__(self, number: int, kernels: Path, eager: bool = False) -> None:
        self._core = cuda_core()
        self._number = number
        self.use()
        gpu = self._core.Device(number)
        capability = gpu.compute_capability
        self._arch = arch_for(10 * capability.major + capability.minor)
        self._directory = kernels
        self._kernels: dict[str, Kernel] = {}
        self.stream = gpu.create_stream()
        self.captures = not eager
        self._graphs = Graphs(self.stream, eager)
        self._pinned = self._core.LegacyPinnedMemoryResource()
        self._staging: dict[int, deque[_Pinned]] = {}
        self._sharing: list[Any] = []
        self._workspace: Array | None = None

    def use(self) -> None:
        self._core.Device(self._number).set_current()

    def adopt(self, engine: Engine) -> None:
        """Give an engine the block of working memory that all share: they run one after another on one stream."""
        if not engine.workspace_bytes:
            return
        self._sharing.append(engine)
        if self._workspace is None or self._workspace.nbytes < engine.workspace_bytes:
            self.mark()()
            self.forget()
            self._workspace = self.zeros((engine.workspace_bytes,), np.uint8)
            for other in self._sharing:
                other.use_workspace(self._workspace.address)
        else:
            engine.use_workspace(self._workspace.address)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        size = max(1, math.prod(shape) * np.dtype(dtype).itemsize)
        buffer = self._core.Device(self._number).allocate(size, stream=self.stream)
        buffer.fill(0, stream=self.stream)
        return Array(buffer, int(buffer.handle), shape, dtype)

    def upload(self, target: Array, source: np.ndarray) -> None:
        source = np.ascontiguousarray(np.broadcast_to(source, target.shape), target.dtype)
        block = self._staging_block(source.nbytes)
        block.bytes[:source.nbytes] = source.reshape(-1).view(np.uint8)
        self._part(target).copy_from(self._part(block, source.nbytes), stream=self.stream)
        self._give_back(block)

    def copy(self, target: Array, source: Array) -> None:
        self._part(target).copy_from(self._part(source), stream=self.stream)

    def download(self, source: Array) -> Callable[[], np.ndarray]:
        block = self._staging_block(source.nbytes)
        self._part(source).copy_to(self._part(block, source.nbytes), stream=self.stream)
        done = self.stream.record()

        def wait() -> np.ndarray:
            done.sync()
            copy = block.bytes[:source.nbytes].copy().view(source.dtype).reshape(source.shape)
            self._give_back(block)
            return copy

        return wait

    def kernel(self, op: str, **arrays: Array) -> Callable[[Any], None]:
        call = calls.call(op, {name: a.shape for name, a in arrays.items()},
                          {name: a.dtype.name for name, a in arrays.items()})
        try:
            if call.name not in self._kernels:
                self._kernels[call.name] = Kernel(Artefact.read(self._directory, call.name, self._arch), self._number)
            kernel = self._kernels[call.name]
            grid = call.grid(int(kernel.artefact.constants["BLOCK"]))
            launch = kernel.bind(grid, **{f"{name}_ptr": a for name, a in arrays.items()}, **call.numbers)
        except KernelError as e:
            raise EngineError(str(e)) from e
        return partial(_launch, launch, arrays)

    def run(self, key: Hashable, enqueue: Callable[[Any], None]) -> None:
        self._graphs.run(key, enqueue)

    def mark(self) -> Callable[[], None]:
        return self.stream.record().sync

    def forget(self) -> None:
        self._graphs.clear()

    def _part(self, memory: Array | _Pinned, size: int | None = None) -> Any:
        """The first `size` bytes, or all, as cuda.core copies them."""
        return self._core.Buffer.from_handle(memory.address, size or memory.nbytes, owner=memory.buffer)

    def _staging_block(self, size: int) -> _Pinned:
        """Page-locked memory that no copy is using. What copies still use is left alone, so nothing waits.

        Small blocks come many at a time: to allocate them may wait for the GPU, and should not happen between steps.
        """
        size = max(SMALLEST_BLOCK, 1 << (size - 1).bit_length())
        blocks = self._staging.setdefault(size, deque())
        if not blocks or not blocks[0].free:
            count = max(1, min(SLAB_BLOCKS, SLAB_BYTES // size))
            slab = self._pinned.allocate(count * size, stream=self.stream)
            blocks.extendleft(_Pinned(slab, int(slab.handle) + i * size, size) for i in range(count))
        return blocks.popleft()

    def _give_back(self, block: _Pinned) -> None:
        """Give it back for use after the copies that are enqueued by now."""
        block.copied = self.stream.record()
        self._staging[block.nbytes].append(block)


class _Pinned:
    """A block of page-locked memory as bytes, and the event after its last copy."""

    def __init__(self, buffer: Any, address: int, nbytes: int) -> None:
        self.buffer = buffer
        self.address = address
        self.nbytes = nbytes
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
        self.copied: Any = None

    @property
    def free(self) -> bool:
        return self.copied is None or self.copied.is_done


def _launch(launch: Callable[[Any], None], arrays: Mapping[str, Array], stream: Any) -> None:
    """`launch(stream)`; what it was bound to, of which it has the addresses only, lives as long as this is held."""
    launch(stream)
