"""This machine's CPU, as far as a compiled engine depends on it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

ISA = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16",
       "avx_vnni", "amx_tile", "amx_bf16", "amx_int8", "amx_fp16", "asimd", "asimdhp", "bf16", "sve", "sve2", "i8mm")
"""Instruction sets that kernels are chosen by, as /proc/cpuinfo names them."""


def describe() -> dict[str, str]:
    """Return the CPU's model name, its architecture, and those of ISA that it has."""
    info = _info()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {"cpu": info.get("model name") or platform.processor() or platform.machine(), "arch": platform.machine(),
            "isa": " ".join(name for name in ISA if name in flags)}


def physical_cores() -> int:
    """Return how many cores this process may run on, hyperthreads of one core counted once."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    topology = (Path(f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") for n in cpus)
    return len({f.read_text() if f.is_file() else str(f) for f in topology})


def resident_memory() -> int:
    """Return the bytes of memory that this process has now, mapped files included; 0 where Linux's /proc is missing."""
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if file.is_file() else 0


def _info() -> dict[str, str]:
    """Return what /proc/cpuinfo says of the first processor; empty where there is no such file."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().split("\n\n")[0].splitlines() if file.is_file() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
