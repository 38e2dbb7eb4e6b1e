"""The choice of the reader for a checkpoint."""

from __future__ import annotations

from pathlib import Path

from export.errors import ExportError
from export.sources.checkpoint import Checkpoint
from export.sources.folder import open_folder
from export.sources.single_file import open_single_file


def open_checkpoint(path: Path, config: str | Path | None = None, tokenizer: str | Path | None = None) -> Checkpoint:
    """Look at a diffusers folder or a single file. The arguments are those of `export.export`. Raises ExportError."""
    if path.is_file():
        return open_single_file(path, config, tokenizer)
    if not path.is_dir():
        raise ExportError(f"{path}: no such file or folder; give a diffusers folder or a .safetensors or .ckpt file "
                          "(nothing is downloaded)")
    if config is not None:
        raise ExportError(f"{path}: got a configuration for a folder, which has its own; leave out --config")
    return open_folder(path, tokenizer)
