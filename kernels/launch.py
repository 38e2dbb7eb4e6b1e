"""Launching artefacts on a GPU through cuda.core, with neither torch nor triton.

    kernel = Kernel(Artefact.read("build/kernels", "to_image_fp16_planes", "sm_90"))
    enqueue = kernel.bind((grid,), x_ptr=image.handle, out_ptr=picture.handle, pixels=512 * 512)
    enqueue(stream)                                        # as often as wanted; also while a graph is captured
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from kernels.aot.artefact import SCRATCH, Artefact, KernelError, arch_for

SCALARS: dict[str, Callable[[int | float], Any]] = {"i32": np.int32, "i64": np.int64, "fp32": np.float32}


class Kernel:
    """An artefact loaded onto one GPU.

    Raises KernelError where cuda.core is missing, the GPU needs another architecture, or the artefact is damaged.
    """

    def __init__(self, artefact: Artefact, device: int = 0) -> None:
        core = cuda_core()
        gpu = core.Device(device)
        gpu.set_current()
        capability = gpu.compute_capability
        expected = arch_for(10 * capability.major + capability.minor)
        if artefact.arch != expected:
            raise KernelError(f"{artefact.name}: got code for {artefact.arch}, expected {expected} for {gpu.name}; "
                              f"read the artefact of {expected}")
        self.artefact = artefact
        self._core = core
        self._code = core.ObjectCode.from_cubin(artefact.code("cubin"))  # unloads the kernel when it goes
        self._kernel = self._code.get_kernel(artefact.entry)
        _allow_shared_memory(self._kernel, artefact, device)

    def bind(self, grid: tuple[int, ...], **arguments: int | float | Any) -> Callable[[Any], None]:
        """Return a function of a stream that enqueues this kernel with these arguments, checked and packed once.

        grid: programs along x, y and z. arguments: by name; device addresses (anything with `__int__`), which must
        stay valid, and numbers. Raises KernelError where names or alignment are not those of the artefact.
        """
        expected = [name for name, _ in self.artefact.arguments if (name, "*u8") not in SCRATCH]
        if sorted(arguments) != sorted(expected):
            raise KernelError(f"{self.artefact.name}: got arguments {sorted(arguments)}, expected {expected}")
        for name in self.artefact.divisible:
            if int(arguments[name]) % 16:
                raise KernelError(f"{self.artefact.name}: {name}: got {int(arguments[name])}, expected a multiple of "
                                  "16; align the buffer, or use the variant without this promise")
        packed = [_pack(kind, arguments.get(name, 0)) for name, kind in self.artefact.arguments]
        launch_config = self._core.LaunchConfig(grid=grid, block=self.artefact.block, shmem_size=self.artefact.shared)
        launch, kernel = self._core.launch, self._kernel

        def enqueue(stream: Any) -> None:
            launch(stream, launch_config, kernel, *packed)

        return enqueue


def _pack(kind: str, value: Any) -> Any:
    """Return a value in the width that the kernel reads; cuda.core takes a plain integer for an address."""
    return int(value) if kind.startswith("*") else SCALARS[kind](value)


def _allow_shared_memory(kernel: Any, artefact: Artefact, device: int) -> None:
    """Ask the driver for more than 48 KiB of dynamic shared memory, which it gives kernel by kernel."""
    if artefact.shared <= 48 * 1024:
        return
    driver = importlib.import_module("cuda.bindings.driver")
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (status,) = driver.cuKernelSetAttribute(attribute, artefact.shared, kernel.handle, driver.CUdevice(device))
    if status != driver.CUresult.CUDA_SUCCESS:
        raise KernelError(f"{artefact.name}: the driver refuses {artefact.shared} bytes of shared memory "
                          f"({status.name}), expected a GPU of {artefact.arch}")


def cuda_core() -> Any:
    """Return the package cuda.core. Raises KernelError with the pip line where it is missing or too old."""
    try:
        core = importlib.import_module("cuda.core")
    except ImportError as e:
        raise KernelError(f"launching kernels needs cuda.core ({e}); pip install 'cuda-core[cu13]'") from e
    if not hasattr(core, "Device"):
        raise KernelError(f"got cuda.core {core.__version__}, expected 0.5 or later; "
                          "pip install --upgrade 'cuda-core[cu13]'")
    return core
