"""The library of the C++ kernels for CPUs: where it is, whether it can run here, and its C interface.

It is `kernels/liblatentrt_kernels.so`, which installing builds where there are CMake and a C++ compiler;
`kernels/csrc/latentrt_kernels.h` documents the interface. Everything else works without it: ask `available()`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from pathlib import Path
from typing import Any

LIBRARY = Path(__file__).parent.parent / "liblatentrt_kernels.so"
EXTENSION = Path(__file__).parent.parent / "liblatentrt_openvino.so"
ISAS = ("avx2", "avx512", "amx")
"""Instruction sets, each a superset of those before it."""

BUILD = ("install CMake 3.25 or later and a C++20 compiler, then run `pip install --force-reinstall --no-deps .` in a "
         "checkout of latentrt")
"""How to get the library, for errors that say it is missing."""

ABI = 2
"""Version of the C interface that the structures below are of."""
Strides = ctypes.c_int64 * 3
"""Elements from one batch entry, head and token to the next."""


class CpuKernelError(RuntimeError):
    """The C++ kernels are missing or cannot run. The message says got / expected / do."""


class AttentionArgs(ctypes.Structure):
    """`latentrt_attention_args` of the header."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("dtype", "isa")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "queries", "keys", "head_dim")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out")),
        *((name, Strides) for name in ("q_stride", "k_stride", "v_stride", "out_stride")),
        ("scale", ctypes.c_float), ("causal", ctypes.c_int), ("threads", ctypes.c_int),
        ("parallel", ctypes.c_void_p), ("parallel_context", ctypes.c_void_p),
    ]


class GroupNormArgs(ctypes.Structure):
    """`latentrt_group_norm_args` of the header."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("dtype", "isa")),
        *((name, ctypes.c_int64) for name in ("batch", "channels", "positions", "groups")),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out")),
        ("eps", ctypes.c_float), ("silu", ctypes.c_int), ("channels_last", ctypes.c_int), ("threads", ctypes.c_int),
        ("parallel", ctypes.c_void_p), ("parallel_context", ctypes.c_void_p),
    ]


class LowRankArgs(ctypes.Structure):
    """`latentrt_low_rank_args` of the header."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("base_dtype", "out_dtype", "isa")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "rank")),
        *((name, ctypes.c_void_p) for name in ("base", "up", "down", "out")), ("threads", ctypes.c_int),
        ("parallel", ctypes.c_void_p), ("parallel_context", ctypes.c_void_p),
    ]


def available() -> str | None:
    """Return None where the kernels can be used, else what to do."""
    try:
        isas()
    except CpuKernelError as e:
        return str(e)
    return None


def isas() -> tuple[str, ...]:
    """Return the instruction sets of this machine that the kernels know, the best last.

    Raises CpuKernelError where there is none, or no library.
    """
    best = load(LIBRARY).latentrt_best_isa()
    if not best:
        raise CpuKernelError("got a CPU without AVX2, FMA or F16C, expected one with them; use another backend")
    return ISAS[:best]


def openvino_extension() -> Path:
    """Return the library that `openvino.Core.add_extension` takes, with Attention and GroupNormSilu of `latentrt`.

    Raises CpuKernelError where it was not built. One that was built for another version of OpenVINO does not load.
    """
    if not EXTENSION.exists():
        raise CpuKernelError(f"got no {EXTENSION}, expected the OpenVINO extension; install openvino first, then "
                             f"{BUILD} with --no-build-isolation")
    isas()
    return EXTENSION


@functools.cache
def fingerprint() -> str:
    """Return a hash of the built libraries: others may compute other last bits."""
    files = [path.read_bytes() for path in (LIBRARY, EXTENSION) if path.exists()]
    return hashlib.sha256(b"".join(files)).hexdigest()[:16]


def call(function: str, args: ctypes.Structure) -> None:
    """Call a function of the library by its name. Raises CpuKernelError where it is missing or gives an error."""
    isas()
    library = load(LIBRARY)
    if status := getattr(library, function)(ctypes.byref(args)):
        raise CpuKernelError(f"{function}: {library.latentrt_status_text(status).decode()}")


@functools.cache
def load(path: Path) -> Any:
    """Return the library at `path`. Raises CpuKernelError where it is missing or of another version."""
    if not path.exists():
        raise CpuKernelError(f"got no {path}, expected the C++ kernels; {BUILD}")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as e:
        raise CpuKernelError(f"{path} does not load: {e}; {BUILD}") from e
    if (abi := library.latentrt_abi()) != ABI:
        raise CpuKernelError(f"{path}: got version {abi} of the interface, expected {ABI}; {BUILD}")
    library.latentrt_status_text.restype = ctypes.c_char_p
    return library
