"""The protocol by which families read a checkpoint, whatever it is on the disk: all that it has, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from transformers import CLIPTokenizer


class Checkpoint(Protocol):
    """A model before any weight is read. Modules have the names of their subfolders in diffusers.

    name: its file's or folder's name. root: the folder that its files are in. pipeline: the class of diffusers that
    draws with it. options: what `pipeline` is made with beside modules.
    """

    @property
    def name(self) -> str: ...

    @property
    def root(self) -> Path: ...

    @property
    def pipeline(self) -> str: ...

    @property
    def options(self) -> Mapping[str, Any]: ...

    def has(self, name: str) -> bool:
        """Return whether it has a module, scheduler or tokenizer of that name."""
        ...

    def config(self, name: str) -> dict[str, Any]:
        """Return the configuration of a module or scheduler, as diffusers writes it. Raises ExportError."""
        ...

    def tokenizer(self, text_encoder: str) -> CLIPTokenizer:
        """Return the tokenizer of a text encoder. Raises ExportError."""
        ...

    def weights(self, names: Iterable[str]) -> tuple[Path, ...]:
        """Return the files with the weights of these modules. Raises ExportError where one has none."""
        ...

    def load(self, name: str, kind: Any) -> nn.Module:
        """Load a module, of class `kind` of diffusers or transformers, with float32 weights and in eval mode.

        Raises ExportError where they do not fit its configuration.
        """
        ...
