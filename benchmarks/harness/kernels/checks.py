"""The checks tell which contenders compute what they should: only those are timed."""

from __future__ import annotations

import math
from typing import Any

import torch

from benchmarks.harness.kernels.bench import Bench, Run

PEER_RMS = 0.05
"""Largest distance of a peer's result from torch's, RMS over RMS; one further off computes something else."""


def checked(bench: Bench, left_out: dict[str, str]) -> dict[str, Run]:
    """Return latentrt's kernels that are right and peers that compute the same; `left_out` gets why others are not."""
    results: dict[str, torch.Tensor] = {}
    for name, run in {**bench.peers, **bench.ours}.items():
        try:
            result = run(*(t.clone() for t in bench.inputs))
            results[name] = result[0] if isinstance(result, tuple) else result
        except Exception as e:  # no kernel for this shape, no compiler, out of memory: each is a reason to say
            left_out[name] = reason(e)
    torch_name, *_ = bench.peers
    if torch_name not in results:
        why = f"not checked, since torch's own op failed: {left_out[torch_name]}"
        left_out.update(dict.fromkeys(bench.ours, why))
        return {}
    framework = results[torch_name].double()
    for name, result in results.items():
        try:
            if name in bench.ours:
                bench.verify(result, results[torch_name])
            elif (error := _relative_rms(result.double(), framework)) > PEER_RMS:
                raise AssertionError(f"differs from {torch_name} by {error:.1%}, expected at most {PEER_RMS:.0%}")
        except AssertionError as e:
            left_out[name] = f"wrong: {e}"
    return {name: run for name, run in {**bench.ours, **bench.peers}.items() if name not in left_out}


def reason(e: Exception) -> str:
    """Return an error in one line, as tables and files have it."""
    lines = str(e).strip().splitlines()
    return f"{type(e).__name__}: {lines[0][:200] if lines else 'no message'}"


def _relative_rms(got: Any, expected: Any) -> float:
    """Return the RMS of the difference over the RMS of what was expected; infinite where that is not a number."""
    value = float(((got - expected).square().mean() / expected.square().mean()).sqrt())
    return value if math.isfinite(value) else math.inf
