"""Weights files: safetensors, and the pickles that PyTorch wrote before it, refused where they would run code."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.serialization import safe_globals

from export.errors import ExportError, first_line

_REFUSED = re.compile(r"GLOBAL (\S+)")
_LIGHTNING = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
              "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint")
_PARAMETERS = "torch.nn.modules.container.ParameterDict"


class _Ignored:
    """Placeholder of PyTorch Lightning's ModelCheckpoint, which the original files name and nothing here uses."""


class ParameterDict:
    """Placeholder of PyTorch's ParameterDict, which old textual inversions have; its attributes are the pickle's."""

    _parameters: dict[str, torch.Tensor]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name."""
        return self._parameters


class StateDict(Mapping[str, torch.Tensor]):
    """The tensors of a weights file by name, each read from the disk when it is asked for.

    global_step: training steps where a pickle says so, else None.
    """

    def __init__(self, path: Path) -> None:
        """Open a file. Raises ExportError where it has no weights, is cut short, or is a pickle that would run code."""
        self.global_step: int | None = None
        if path.suffix == ".safetensors":
            try:
                file = safe_open(path, "pt")
            except (SafetensorError, OSError) as e:
                raise ExportError(f"{path}: not a whole safetensors file ({first_line(e)}); copy it again") from e
            self._names, self._read = frozenset(file.keys()), file.get_tensor
        elif path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
            data = read_pickle(path)
            found = data.get("state_dict", data)
            tensors = {k: v for k, v in found.items() if isinstance(v, torch.Tensor)} if isinstance(found, dict) else {}
            if isinstance(step := data.get("global_step"), int):
                self.global_step = step
            self._names, self._read = frozenset(tensors), tensors.__getitem__
        else:
            raise ExportError(f"{path}: got a file that ends in {path.suffix!r}, expected .safetensors or .ckpt")

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


def read_pickle(path: Path) -> dict[str, Any]:
    """Read the dictionary that PyTorch saved. Raises ExportError where it is none, is damaged, or would run code."""
    try:
        with safe_globals([*((_Ignored, name) for name in _LIGHTNING), (ParameterDict, _PARAMETERS)]):
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as e:  # torch's safe unpickler raises whatever the bytes of a damaged file lead it to
        if isinstance(e, pickle.UnpicklingError) and (found := _REFUSED.search(str(e))):
            raise ExportError(f"{path}: refused, loading this pickle would run code ({found[1]}); "
                              "get the model as .safetensors") from e
        raise ExportError(f"{path}: not a whole checkpoint that PyTorch loads without running code; "
                          "copy it again, or get the model as .safetensors") from e
    if not isinstance(data, dict):
        raise ExportError(f"{path}: got a {type(data).__name__}, expected a dictionary of weights")
    return data
