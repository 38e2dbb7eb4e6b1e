"""Samplers give one timed sample of a call: `python -m benchmarks kernels --help` says how they are taken."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from benchmarks.harness.kernels.bench import Call

CPU_SAMPLE = 0.01
"""Seconds of calls in a sample on a CPU."""
OTHERS_ASLEEP = 0.03
"""Seconds after which no library's threads still wait for work on a core."""


def sampler(call: Call, device: str) -> Callable[[], float]:
    """Return a function that gives the seconds of one call, mean of those in a sample, each time it is called."""
    return _on_gpu(call) if device == "cuda" else _on_cpu(call)


def _on_cpu(call: Call) -> Callable[[], float]:
    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call.run(*call.inputs)
        return (time.perf_counter() - start) / calls

    seconds(1)
    calls = math.ceil(CPU_SAMPLE / seconds(1))

    def sample() -> float:
        time.sleep(OTHERS_ASLEEP)
        seconds(calls)
        return seconds(calls)
    return sample


def _on_gpu(call: Call) -> Callable[[], float]:
    """Capture a CUDA graph of calls, replayed after other memory has filled the cache. That also hides its launch."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    size = sum(t.numel() * t.element_size() for t in call.inputs)
    calls = max(1, min(64, math.ceil(3 * cache / size)))
    sets = [call.inputs, *(tuple(t.clone() for t in call.inputs) for _ in range(calls - 1))]
    other = torch.empty(4 * cache, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call.run(*sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for inputs in sets:
            kept.append(call.run(*inputs))  # kept, so that every call writes to memory of its own
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        other.zero_()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls
    sample()
    return sample
