"""PyTorch on the device of a config: which devices and precisions this machine has, and how cuDNN is set there."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from engines.machine.cpu import describe
from engines.machine.gpu import gpus
from engines.machine.vendor import importing
from engines.spec import EngineConfig, EngineError

PIP = "pip install torch onnx-ir"


def vendor() -> Any:
    """Return the package torch. Raises EngineError where it is missing."""
    with importing("inductor", PIP):
        import torch
    return torch


def gpu(config: EngineConfig) -> int | None:
    """Return the number of the config's GPU, None for the CPU. Raises EngineError for a device that is not here."""
    if config.device == "cpu":
        return None
    match = re.fullmatch(r"cuda(?::(\d+))?", config.device)
    if not match:
        raise EngineError(f"inductor: got device {config.device!r}, expected cpu or cuda:N")
    number, here = int(match[1] or 0), gpus()
    if number >= len(here):
        raise EngineError(f"inductor: got device {config.device} on a machine of {len(here)} NVIDIA GPUs, expected one "
                          "of its own; packages are built where they run")
    if vendor().version.cuda is None:
        raise EngineError(f"inductor: got device {config.device} and PyTorch without CUDA, expected one with it; "
                          "see https://pytorch.org/get-started/locally")
    return number


def name(number: int | None) -> str:
    """Return PyTorch's name of a GPU, or of the CPU for None."""
    return "cpu" if number is None else f"cuda:{number}"


def cpu_dtypes() -> tuple[str, ...]:
    """Return the precisions that this CPU computes in, the one to prefer first."""
    has = describe()["isa"].split()
    return ("bf16", "fp32") if {"avx512_bf16", "amx_bf16", "bf16"} & set(has) else ("fp32",)


@contextlib.contextmanager
def flags(config: EngineConfig) -> Iterator[None]:
    """Set cuDNN as engines use it: convolutions timed once a shape, and TF32 never where float32 was asked for."""
    if config.device == "cpu":
        yield
        return
    with vendor().backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False,
                                       allow_tf32=config.dtype != "fp32"):
        yield
