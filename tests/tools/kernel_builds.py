"""The ahead-of-time build in processes of its own: tests run with interpreted kernels where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PLANES = {"fp16": "to_image_fp16_planes", "bf16": "to_image_bf16_planes"}
"""Two of the artefacts of to_image, by dtype."""


def environment(**changes: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")} | changes


def cli(*arguments: str | Path, cwd: Path = ROOT, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "kernels", *map(str, arguments)], cwd=cwd, env=environment(**changes),
                          capture_output=True, text=True, timeout=600)


def build(output: Path, cache: Path, *arguments: str, cwd: Path = ROOT) -> dict[str, Any]:
    done = cli("build", "-o", output, "--cache", cache, "-j", "1", "--json", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def contents(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}
