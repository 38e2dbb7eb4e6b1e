"""`python -m export.embedding FILE.pt -o FILE.safetensors`: a pickled textual inversion for the runtime to read."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from export.errors import ExportError
from export.sources.weights import ParameterDict, read_pickle

ENCODERS = ({"clip_l", "clip_g"}, {"text_encoders_0", "text_encoders_1"})
"""Names of the tensors for the two text encoders of Stable Diffusion XL."""


def convert(source: Path, target: Path, name: str | None = None, force: bool = False) -> dict[str, torch.Tensor]:
    """Write the textual inversion of a .pt or .bin file as safetensors and return its tensors, [n, width] each.

    source: what diffusers saves, a dictionary of one word and its vectors; what the Stable Diffusion web UI saves, with
    `string_to_param` and `name`; or one for Stable Diffusion XL, whose tensors keep their names, as
    `runtime.text.embeddings` reads them. name: the word, instead of the file's own. Raises ExportError where `source`
    is none of these, or loading it would run code, and where `target` exists and `force` is false.
    """
    if target.suffix != ".safetensors":
        raise ExportError(f"{target}: got a name that ends in {target.suffix!r}, expected .safetensors")
    if target.exists() and not force:
        raise ExportError(f"{target} exists; choose another name or pass --force to replace it")
    tensors = _tensors(source, read_pickle(source), name)
    found = {key: torch.atleast_2d(value.detach()).contiguous().clone() for key, value in tensors.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as directory:
        save_file(found, Path(directory) / target.name)
        os.replace(Path(directory) / target.name, target)
    return found


def _tensors(source: Path, data: dict[str, Any], name: str | None) -> dict[str, torch.Tensor]:
    found = data
    if "string_to_param" in data:
        parameters = data["string_to_param"]
        parameters = parameters.tensors if isinstance(parameters, ParameterDict) else parameters
        word = name or data.get("name") or source.stem
        found = {word if len(parameters) == 1 else str(key): value for key, value in parameters.items()}
    elif len(data) == 1 and name:
        found = {name: next(iter(data.values()))}
    if not all(isinstance(value, torch.Tensor) for value in found.values()) or (
            len(found) != 1 and set(found) not in ENCODERS):
        names = ", ".join(map(str, list(found)[:6])) or "nothing"
        raise ExportError(f"{source}: got {names}, expected one word and its vectors, string_to_param, or clip_l and "
                          "clip_g; it is no textual inversion")
    if name and len(found) != 1:
        raise ExportError(f"{source}: got the name {name!r} for a file of {', '.join(found)}, whose tensors keep their "
                          f"names; name it when it is used: --embedding {name}=FILE")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 for what the user can put right."""
    parser = argparse.ArgumentParser(prog="python -m export.embedding",
                                     description="Convert a pickled textual inversion to safetensors.")
    parser.add_argument("source", type=Path, help="a .pt or .bin file")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help=".safetensors file to write")
    parser.add_argument("--name", help="the word that stands for it (default: the file's own)")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    options = parser.parse_args(arguments)
    try:
        found = convert(options.source, options.output, options.name, options.force)
    except (ExportError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    for key, value in found.items():
        print(f"{options.output}: {key}, {value.shape[0]} vectors of width {value.shape[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
