"""Checks of every launcher before it hands pointers to a Triton kernel, and the words for dtypes and GPUs."""

from __future__ import annotations

from typing import Any

import torch
import triton

from kernels.aot.artefact import ARCHS

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
OLDEST = {"fp16": 75, "bf16": 80, "fp32": 75}
"""The oldest compute capability that can load and multiply a dtype."""


def archs_of(dtype: str) -> tuple[int, ...]:
    """Return the compute capabilities that kernels are built for and that can load and multiply `dtype`."""
    return tuple(arch for arch in ARCHS if arch >= OLDEST[dtype])


def check_tensors(op: str, kernel: Any = None, **tensors: torch.Tensor) -> None:
    """Refuse tensors of a dtype that no kernel takes, on different devices, or where `kernel` cannot read them.

    Raises TypeError for a dtype, ValueError for a device. A kernel that Triton interprets reads every device.
    """
    (first_name, first), *_ = tensors.items()
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{op}: {name}: got {tensor.dtype}, expected one of {', '.join(map(str, DTYPES))}; "
                            "convert it with .to(torch.float16)")
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name}: got a tensor on {tensor.device}, expected {first.device}, where "
                             f"{first_name} is; move one of them")
    if first.device.type != "cuda" and isinstance(kernel, triton.JITFunction):
        raise ValueError(f"{op}: {first_name}: got a tensor on {first.device}, expected cuda; "
                         f"torch.ops.latentrt.{op} takes tensors on a CPU and runs the reference there")


def check_output(op: str, kernel: Any, out: torch.Tensor, x: torch.Tensor, shape: tuple[int, ...],
                 strides: tuple[int, ...] | None = None) -> None:
    """Refuse an `out` that is not like `x` in dtype and device, or not of `shape` and `strides`, contiguous by default.

    Raises TypeError for the dtype, ValueError for the rest, as `check_tensors` does.
    """
    check_tensors(op, kernel, x=x, out=out)
    check_dtype(op, x.dtype, out=out)
    check_shape(op, shape, out=out)
    if strides is None:
        check_contiguous(op, out=out)
    elif out.stride() != strides:
        raise ValueError(f"{op}: out: got strides {out.stride()}, expected {strides}; make it with torch.empty_like(x)")


def check_dtype(op: str, dtype: torch.dtype, **tensors: torch.Tensor) -> None:
    """Raise TypeError for a tensor whose dtype is not `dtype`."""
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name}: got {tensor.dtype}, expected {dtype}; convert it with .to({dtype})")


def check_shape(op: str, shape: tuple[int, ...], **tensors: torch.Tensor) -> None:
    """Raise ValueError for a tensor whose shape is not `shape`."""
    for name, tensor in tensors.items():
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name}: got shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def check_contiguous(op: str, **tensors: torch.Tensor) -> None:
    """Raise ValueError for a tensor that is not contiguous."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name}: got shape {tuple(tensor.shape)} with strides {tensor.stride()}, "
                             "expected a contiguous tensor; call .contiguous()")


def check_device(op: str, like: str, device: torch.device, **tensors: torch.Tensor) -> None:
    """Raise ValueError for a tensor that is not on `device`, where the one called `like` is."""
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{op}: {name}: got a tensor on {tensor.device}, expected {device}, where {like} is; move "
                             "one of them")


def arch_of(tensor: torch.Tensor) -> int:
    """Return the compute capability of the tensor's device (90: 9.0); 90 for a tensor that is on no GPU."""
    if tensor.device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor
