"""Inputs and tolerances that the tests of the C++ kernels share.

The error, both the largest and the RMS, may be at most twice torch's own in the same dtype on the same inputs, plus a
floor.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch

from benchmarks.cases import CPP_FLOOR, most_error

DTYPES = {"fp32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16), "fp16": np.dtype(np.float16)}
TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def normal(shape: tuple[int, ...], dtype: str, seed: int, amplitude: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * amplitude).astype(DTYPES[dtype])


def poisoned(like: np.ndarray) -> np.ndarray:
    out = np.empty_like(like)
    out[...] = np.nan
    return out


def to_torch(array: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32)).to(TORCH[dtype])


def passes(ours: np.ndarray, exact: np.ndarray, peer: torch.Tensor, dtype: str) -> bool:
    """NaN passes nothing: no comparison with it is true."""
    error, allowed = ours.astype(np.float64) - exact, peer.double().numpy() - exact
    return all(size(error) <= most_error(size(allowed), size(exact), CPP_FLOOR[dtype]) for size in (largest, rms))


def largest(x: np.ndarray) -> float:
    return float(np.abs(x).max())


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x).mean()))
