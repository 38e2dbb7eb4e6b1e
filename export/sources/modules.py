"""PyTorch modules with exactly the weights that a folder or a file has."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from export.errors import ExportError, first_line
from export.sources.files import weight_files


def load_folder(folder: Path, kind: Any) -> torch.nn.Module:
    """Load the module in a folder of diffusers: of class `kind`, with float32 weights and in eval mode.

    Raises ExportError.
    """
    files = weight_files(folder)
    try:
        module, info = kind.from_pretrained(
            folder, torch_dtype=torch.float32, variant="fp16" if ".fp16" in files[0].name else None,
            use_safetensors=files[0].suffix == ".safetensors", local_files_only=True, output_loading_info=True)
    except (OSError, RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError) as e:
        raise ExportError(f"{folder}: the weights could not be read, or do not fit config.json: {first_line(e)}") from e
    _require_keys(str(folder), info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    return module.eval()


def fit(where: str, kind: Any, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Make a module of class `kind` (of diffusers or transformers) with these weights, in eval mode.

    Raises ExportError, which names `where` they are from, unless they are all that it has.
    """
    if issubclass(kind, PreTrainedModel):
        module, info = kind.from_pretrained(
            None, config=kind.config_class.from_dict(dict(config)), state_dict=weights, torch_dtype=torch.float32,
            output_loading_info=True)
        _require_keys(where, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
        return module.eval()
    with torch.device("meta"):
        module = kind.from_config(dict(config))
    expected = {key: value.shape for key, value in module.state_dict().items()}
    shapes = {key for key in expected.keys() & weights.keys() if expected[key] != weights[key].shape}
    _require_keys(where, expected.keys() - weights.keys(), weights.keys() - expected.keys(), shapes)
    module.load_state_dict(weights, assign=True)
    return module.eval()


def _require_keys(where: str, missing: Any, unexpected: Any, shapes: Any) -> None:
    for keys, what in ((missing, "lack"), (unexpected, "have, and the model does not,"),
                       (shapes, "have another shape of")):
        if keys:
            names = sorted(str(key) for key in keys)
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise ExportError(f"{where}: the weights {what} {', '.join(names[:8])}{more}; "
                              "they do not fit the model's configuration")
