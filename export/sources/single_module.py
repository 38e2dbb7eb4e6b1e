"""A single module is a network in a folder or file of its own: a ControlNet, or a VAE."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, ControlNetModel

from engines.bundle import Bundle
from export.errors import ExportError
from export.sources.architectures import configuration
from export.sources.convert import CONTROL, PREFIXES, convert
from export.sources.files import read_json, weight_files
from export.sources.modules import fit, load_folder
from export.sources.weights import StateDict


class Kind(NamedTuple):
    """A kind of network.

    model: its class in diffusers. weights: what `export.sources.convert` calls it. config: the module of a whole model
    whose configuration it has, or shares.
    """

    model: Any
    weights: str
    config: str


KINDS = {"ControlNetModel": Kind(ControlNetModel, "control", "unet"),
         "AutoencoderKL": Kind(AutoencoderKL, "vae", "vae")}
"""Class of diffusers → the kind of network."""

_SHIPPED = {"sd1": "sd1", "sd2": "sd2-base", "sdxl": "sdxl"}
"""Family of a bundle → the architecture that its networks have."""
_MARKS = {
    "control_model.input_hint_block.0.weight": ("ControlNetModel", ""),
    "input_hint_block.0.weight": ("ControlNetModel", CONTROL),
    "first_stage_model.decoder.conv_in.weight": ("AutoencoderKL", ""),
    "decoder.mid.block_1.norm1.weight": ("AutoencoderKL", PREFIXES["vae"]),
}
"""A weight that only one kind of file has → the kind, and what its names lack of those in a whole checkpoint."""


@dataclass(frozen=True)
class SingleModule:
    """A network before its weights are read.

    path: its folder or file. kind: one of KINDS. config: all that the class in diffusers is made with. state: the
    weights of a file, None for a folder.
    """

    path: Path
    kind: str
    config: Mapping[str, Any]
    state: StateDict | None = None

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def root(self) -> Path:
        """The folder of `weights`."""
        return self.path if self.state is None else self.path.parent

    @property
    def weights(self) -> tuple[Path, ...]:
        """Files that hold its weights."""
        return tuple(weight_files(self.path)) if self.state is None else (self.path,)

    def load(self) -> torch.nn.Module:
        """Load it with float32 weights and in eval mode. Raises ExportError where they do not fit `config`."""
        kind = KINDS[self.kind]
        if self.state is None:
            return load_folder(self.path, kind.model)
        return fit(str(self.path), kind.model, self.config,
                   convert(_prefixed(self.state), kind.weights, self.config))


def open_module(path: Path, bundle: Bundle, config: str | Path | None = None) -> SingleModule:
    """Look at a diffusers folder of one network, or a single file in the original layout.

    config, for a single file: the architecture of the model that it is for, or a diffusers folder; that of the family
    of `bundle` by default. Raises ExportError.
    """
    if path.is_dir():
        kind, found, state = *_look_at_folder(path, config), None
        weight_files(path)
    elif path.is_file():
        state = StateDict(path)
        kind, found = _look_at_file(path, state, bundle, config)
    else:
        raise ExportError(f"{path}: no such file or folder; give a ControlNet or a VAE (nothing is downloaded)")
    return SingleModule(path, kind, _with_defaults(KINDS[kind].model, found), state)


def _look_at_folder(path: Path, config: str | Path | None) -> tuple[str, Mapping[str, Any]]:
    if config is not None:
        raise ExportError(f"{path}: got a configuration for a folder, which has its own; leave out --config")
    if not (path / "config.json").is_file():
        inside = "; give the folder of its VAE, PATH/vae" if (path / "model_index.json").is_file() else ""
        raise ExportError(f"{path}: no config.json, expected a diffusers folder of one ControlNetModel or "
                          f"AutoencoderKL{inside}")
    found = read_json(path / "config.json")
    kind = str(found.get("_class_name"))
    if kind not in KINDS:
        raise ExportError(f"{path}: got a {kind}, expected one of {', '.join(KINDS)}")
    return kind, found


def _look_at_file(path: Path, state: StateDict, bundle: Bundle,
                  config: str | Path | None) -> tuple[str, Mapping[str, Any]]:
    if any(name.startswith(PREFIXES["unet"]) for name in state):
        raise ExportError(f"{path}: got a whole checkpoint, expected a ControlNet or a VAE; make a bundle of it with "
                          "-o, or give its VAE as a file or folder of its own")
    kind = next((kind for mark, (kind, _) in _MARKS.items() if mark in state), None)
    if kind is None:
        raise ExportError(f"{path}: no ControlNet or VAE in the original layout; give one of diffusers as a folder, "
                          "with its config.json")
    architecture = config if config is not None else _SHIPPED.get(bundle.manifest.family)
    if architecture is None:
        raise ExportError(f"{path}: its architecture is not known, as {bundle.path} is of no family that ships with "
                          "latentrt; pass --config DIR, the diffusers folder of the model")
    return kind, configuration(architecture, KINDS[kind].config)


def _prefixed(state: StateDict) -> Mapping[str, torch.Tensor]:
    """Return the weights under the names of a whole checkpoint, which files of one network may leave out."""
    prefix = next(prefix for mark, (_, prefix) in _MARKS.items() if mark in state)
    return {f"{prefix}{name}": value for name, value in state.items()} if prefix else state


def _with_defaults(model: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `model` is made with. A ControlNet has what it shares with its UNet's configuration."""
    parameters = inspect.signature(model.__init__).parameters
    return {name: config.get(name, parameter.default) for name, parameter in parameters.items()
            if parameter.default is not inspect.Parameter.empty}
