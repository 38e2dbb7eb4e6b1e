"""The files of an engine, and what its build writes down about it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PLAN, ABOUT = "engine.plan", "tensorrt.json"
"""TensorRT's compiled network, and the record of its build."""


def read(directory: Path) -> dict[str, Any]:
    """Return what the build of the engine in `directory` wrote down; a key is missing where it was not to be had.

    library: name → version. arch, flags: what it was built for and with. kernels: kind of site → {asked, used}.
    timings: [{ours, seconds, rounds}] of the builds that were compared, `ours` being the kinds whose kernels are.
    failed: build with kernels of ours → why it is not used. sites: kind → {ours, vendor}, how many nodes are which.
    layers, attentions: how many the network has. engine_layers: [{name, kind, kernel, milliseconds}] of the plan,
    measured on the GPU that built it. memory: bytes by what for, as the builder said. device_memory_bytes: working
    memory of a run. max_shared: bytes of shared memory that a kernel of ours may take, None for no limit. refittable:
    weights that can change. plan_bytes, build_seconds, build_peak_bytes, warnings.

    Raises OSError or ValueError for a damaged file.
    """
    about = json.loads((directory / ABOUT).read_text(encoding="utf8"))
    if not isinstance(about, dict):
        raise ValueError(f"got {type(about).__name__}, expected an object")
    return about


def write(directory: Path, about: Mapping[str, Any]) -> None:
    """Write the record of the engine in `directory`."""
    (directory / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf8")


def note(directory: Path, more: Mapping[str, Any]) -> None:
    """Add `more` to the record of the engine in `directory`."""
    write(directory, {**read(directory), **more})


def write_whole(file: Path, data: Any) -> None:
    """Write `data` (anything with a buffer) under a temporary name, then rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as temporary:
        temporary.write(data)
    os.replace(temporary.name, file)
