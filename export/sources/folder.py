"""A whole model as a diffusers folder: model_index.json and a subfolder for each module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import CLIPTokenizer

from export.errors import ExportError
from export.sources.files import read_json, weight_files
from export.sources.modules import load_folder
from export.sources.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Folder:
    """An `export.sources.checkpoint.Checkpoint`.

    options: its model_index.json. words: a folder with the tokenizer to use instead of its own.
    """

    root: Path
    options: Mapping[str, Any]
    words: Path | None = None

    @property
    def name(self) -> str:
        return self.root.resolve().name

    @property
    def pipeline(self) -> str:
        return str(self.options.get("_class_name"))

    def has(self, name: str) -> bool:
        """Return whether model_index.json lists it; of a module that was left out it says [null, null]."""
        return any(self.options.get(name) or ())

    def config(self, name: str) -> dict[str, Any]:
        return read_config(self.root, name)

    def tokenizer(self, text_encoder: str) -> CLIPTokenizer:
        return load_tokenizer(self.words or self.root / text_encoder.replace("text_encoder", "tokenizer"))

    def weights(self, names: Iterable[str]) -> tuple[Path, ...]:
        return tuple(file for name in names for file in weight_files(self.root / name))

    def load(self, name: str, kind: Any) -> nn.Module:
        return load_folder(self.root / name, kind)


def open_folder(path: Path, tokenizer: str | Path | None = None) -> Folder:
    """Read a folder's model_index.json. tokenizer: a folder to use instead of its own. Raises ExportError."""
    file = path / "model_index.json"
    if not file.is_file():
        raise ExportError(f"{path}: not a diffusers folder, it has no model_index.json; give the folder that "
                          "StableDiffusionPipeline.save_pretrained wrote, or one .safetensors or .ckpt file")
    folder = Folder(path, read_json(file), Path(tokenizer) if tokenizer else None)
    if tokenizer and folder.has("tokenizer") and folder.has("tokenizer_2"):
        raise ExportError(f"{path}: got a tokenizer for a model that has two of its own; leave out --tokenizer")
    return folder


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """Read the configuration of a module or scheduler in a diffusers folder. Raises ExportError."""
    return read_json(folder / name / ("scheduler_config.json" if name.endswith("scheduler") else "config.json"))
