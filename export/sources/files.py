"""Files of a diffusers folder: its JSON, and which of its weights files count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from export.errors import ExportError


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object. Raises ExportError where it is missing or not one."""
    try:
        data = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as e:
        raise ExportError(f"{path}: could not be read ({e}); the checkpoint is incomplete, copy it again") from e
    if not isinstance(data, dict):
        raise ExportError(f"{path}: got {type(data).__name__}, expected a JSON object")
    return data


def weight_files(folder: Path) -> list[Path]:
    """Choose the weights of one module as diffusers would: safetensors before .bin, full before fp16."""
    for suffix in (".safetensors", ".bin"):
        files = sorted(f for f in folder.glob(f"*{suffix}")
                       if f.name.startswith(("diffusion_pytorch_model", "model", "pytorch_model")))
        for variant in ("", ".fp16"):
            if found := [f for f in files if (".fp16" in f.name) == bool(variant) and ".non_ema" not in f.name]:
                return found
    raise ExportError(f"{folder}: no weights, expected a .safetensors or .bin file; copy the whole checkpoint")
