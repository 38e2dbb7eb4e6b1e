"""Our kernels or PyTorch's own, site by site: time both on the real shapes, on the engine's device, keep the faster.

What is timed is the site alone: on a GPU in a CUDA graph, PyTorch's norms and GEGLU as its compiler fuses them; on a
CPU as it runs them eagerly, since compiling each would take longer than it can win. Inputs are in the cache for both.
"""

from __future__ import annotations

import functools
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._inductor.utils import fresh_cache

from engines.inductor.torch.run import Both, Site

ROUNDS = 5
"""Turns that are taken, each with both."""
ENOUGH = {"cpu": 5e-3, "cuda": 1e-3}
"""Seconds that one turn times together, at least one run."""
WARM = 3
"""Runs on a GPU before those that are timed."""

logger = logging.getLogger(__name__)


def choose(sites: Mapping[Site, Both], asked: Mapping[str, str], dtype: torch.dtype, device: str,
           tolerance: float) -> tuple[dict[Site, str], dict[str, Any]]:
    """Return whose kernel computes each of `sites`, "ours" or "vendor", and what the engine's record says of that.

    asked: kind → ours, vendor, or auto, which times both. tolerance: most relative RMS of the difference between both;
    ours is not taken where it differs more, or fails, and the record says why.
    """
    chosen: dict[Site, str] = {}
    timings: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache, fresh_cache(dir=cache):
        for site, both in sites.items():
            chosen[site] = asked[site.kind]
            if chosen[site] != "auto":
                continue
            try:
                rounds = measure(site, both, dtype, device, tolerance)
                chosen[site] = faster(rounds)
                timings.append({"kind": site.kind, "shapes": site.shapes, "arguments": dict(site.arguments),
                                "sites": both.count, "used": chosen[site],
                                "seconds": {whose: statistics.median(taken) for whose, taken in rounds.items()},
                                "rounds": rounds})
            except Exception as e:  # of Triton, ctypes, CUDA: whatever it is, PyTorch's own is there
                chosen[site], failed[_name(site)] = "vendor", " ".join(f"{type(e).__name__}: {e}".split())
                logger.info("%s: PyTorch's own: %s", _name(site), failed[_name(site)])
    if timings:
        logger.info("timed %d sites in %.1f s", len(timings), time.perf_counter() - start)
    return chosen, {"timings": timings, "failed": failed}


def faster(rounds: Mapping[str, list[float]]) -> str:
    """Return whose median is lower; the vendor's where they are equal."""
    return min(("vendor", "ours"), key=lambda whose: statistics.median(rounds[whose]))


def measure(site: Site, both: Both, dtype: torch.dtype, device: str, tolerance: float) -> dict[str, list[float]]:
    """Return "ours" and "vendor" → seconds of a run in each of ROUNDS turns taken with the other.

    Raises ValueError where the two differ by more than `tolerance` (relative RMS), and what they raise themselves.
    """
    arguments = dict(site.arguments)
    tensors = [_seeded(n, shape, strides, dtype, device)
               for n, (shape, strides) in enumerate(zip(site.shapes, both.strides, strict=True))]
    vendor = both.vendor
    if device != "cpu" and site.kind != "attention":
        vendor = compiled(vendor)
    calls = {"ours": functools.partial(both.ours, *tensors, **arguments),
             "vendor": functools.partial(vendor, *tensors, **arguments)}
    with torch.no_grad():
        ours, expected = (call().float() for call in calls.values())
        apart = float((ours - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-30))
        if not apart <= tolerance:
            raise ValueError(f"differs from PyTorch's by {apart:.1e} (relative RMS), expected at most {tolerance:.0e}")
        del ours, expected
        samplers = {whose: _sampler_on_cpu(call) if device == "cpu" else _sampler_on_gpu(call, device)
                    for whose, call in calls.items()}
        rounds: dict[str, list[float]] = {whose: [] for whose in calls}
        for _ in range(ROUNDS):
            for whose, sample in samplers.items():
                rounds[whose].append(sample())
    return rounds


def compiled(function: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """Return `function` compiled for the shapes of its first call, whatever it was compiled for before."""
    torch.compiler.reset()  # else shapes of earlier calls count, and after a few it is not compiled
    return torch.compile(function, dynamic=False, fullgraph=True, backend=backend)


def _sampler_on_cpu(call: Callable[[], Any]) -> Callable[[], float]:
    def seconds(runs: int) -> float:
        start = time.perf_counter()
        for _ in range(runs):
            call()
        return (time.perf_counter() - start) / runs

    runs = math.ceil(ENOUGH["cpu"] / seconds(1))
    return lambda: seconds(runs)


def _sampler_on_gpu(call: Callable[[], Any], device: str) -> Callable[[], float]:
    """Time by the GPU's clock, in a graph, so that launching from Python does not count: a package does not."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                call()
            begin.record()
            call()
            end.record()
            end.synchronize()
            runs = math.ceil(ENOUGH["cuda"] / max(begin.elapsed_time(end) / 1e3, 1e-6))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(runs):
                call()

    def sample() -> float:
        with torch.cuda.device(device):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3 / runs
    sample()
    return sample


def _seeded(seed: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype,
            device: str) -> torch.Tensor:
    """Return standard normal values in memory of these strides; in order where one of them is 0."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    return torch.empty_strided(shape, strides, dtype=dtype, device=device).copy_(values) if all(strides) else values


def _name(site: Site) -> str:
    return f"{site.kind} {' '.join('x'.join(map(str, shape)) for shape in site.shapes)}"
