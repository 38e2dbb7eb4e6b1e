"""Measures that every benchmark shares: the machine it ran on, medians with spread, memory; and tables of them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from engines.machine.gpu import gpus

LIBRARIES = ("latentrt", "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt-cu13",
             "tensorrt-rtx-cu13-bindings", "torch", "triton", "diffusers", "transformers")
MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
"""Device → side of the square matrices whose product gives its matrix rate."""
SHARE = 1.5
"""Memory that one contender may take over that of its weights in float32: these, and what a library makes of them."""


def machine() -> dict[str, Any]:
    """Return hardware, library versions and commit, as they go into every result file."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf8") if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")),
                 platform.processor())
    flags = next((line for line in info.splitlines() if line.startswith("flags")), "").split()
    return {
        "cpu": model, "cores": len(os.sched_getaffinity(0)),
        "isa": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(), "versions": _versions(), "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Return median, 20th and 80th percentile of timings in seconds, and how many there are."""
    p20, median, p80 = np.percentile(seconds, [20, 50, 80])
    return {"median": float(median), "p20": float(p20), "p80": float(p80), "runs": len(seconds)}


def peak_memory() -> int:
    """Return the most bytes of resident memory that this process has had, mapped files included.

    It is Linux's own figure for the program that runs; getrusage's would include what the parent had when it started
    this.
    """
    return _kilobytes("/proc/self/status", "VmHWM") * 1024


def free_memory() -> int:
    """Return the bytes that a new process can have without swapping."""
    return _kilobytes("/proc/meminfo", "MemAvailable") * 1024


def require_memory(needed: int, what: str) -> None:
    """Raise ValueError where fewer bytes are free."""
    if (free := free_memory()) < needed:
        raise ValueError(f"{what}: got {free / 1e9:.1f} GB of free memory, expected {needed / 1e9:.1f} GB; end other "
                         "programs, use a machine with more, or measure a smaller model")


def gpu() -> dict[str, Any]:
    """Return the first GPU and its driver, as they go into a result file. Raises ValueError without one."""
    here = gpus()
    if not here:
        raise ValueError("--device: got cuda, expected cpu on a machine without an NVIDIA GPU")
    wanted = "driver_version,power.limit,clocks.max.sm,memory.total"
    return {"gpu": here[0].name, "arch": here[0].arch, wanted: _nvidia_smi(wanted)}


def free_gpu_memory() -> int:
    """Return the bytes that are free on the first GPU."""
    return int(_nvidia_smi("memory.free").split()[0]) * 2**20


def _nvidia_smi(wanted: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of one set of keys as aligned text columns."""
    heads = list(rows[0])
    cells = [heads, *([str(row[h]) for h in heads] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def write_json(path: Path, data: Any) -> None:
    """Write a result file under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf8")
    temporary.replace(path)


def _kilobytes(file: str, name: str) -> int:
    lines = Path(file).read_text(encoding="utf8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _versions() -> dict[str, str]:
    installed = {d.metadata["Name"].lower() for d in metadata.distributions() if d.metadata["Name"]}
    return {name: metadata.version(name) for name in LIBRARIES if name in installed}


def _commit() -> str:
    try:
        run = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False,
                             cwd=Path(__file__).parent)
    except FileNotFoundError:
        return "unknown"
    return run.stdout.strip() or "unknown"
