"""What joins a bundle after its export: a ControlNet, or a VAE in the place of its own."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel

from engines.bundle import Bundle, Manifest
from export.errors import FAMILIES, ExportError
from export.families.controlnet import RESIDUAL, ControlNet, residual_specs
from export.families.manifest import CONTROL
from export.families.stable_diffusion import Graph, VAEDecoder, VAEEncoder
from export.sources.checkpoint import load_folder, read_json, weight_files
from export.sources.convert import CONTROL as CONTROL_WEIGHTS
from export.sources.convert import PREFIXES, convert
from export.sources.single_file import CONFIGS, fit
from export.sources.weights import StateDict

KINDS = {"ControlNetModel": "control", "AutoencoderKL": "vae"}
"""Classes of diffusers that can be added → what they are here."""

_SHIPPED = {"sd1": "sd1", "sd2": "sd2-base", "sdxl": "sdxl"}
PARTS = ("text", "time", "hint", "body")
"""Parts that a ControlNet is cut into; the names of their graphs end in these."""

_UNSUPPORTED = ("class_embed_type", "encoder_hid_dim_type", "num_class_embeds")
_MARKS = {  # weights that only one kind of file has → what their names have to begin with, and how they begin in it
    "control_model.input_hint_block.0.weight": ("control", ""),
    "input_hint_block.0.weight": ("control", CONTROL_WEIGHTS),
    "first_stage_model.decoder.conv_in.weight": ("vae", ""),
    "decoder.mid.block_1.norm1.weight": ("vae", PREFIXES["vae"]),
}


@dataclass(frozen=True)
class Addition:
    """A module before its weights are read; to `export.trace.component` it is what a Checkpoint is.

    name: its file's or folder's name. root: folder of `weights`. key: of what it becomes in the bundle, "control_NAME"
    or "vae". graphs: components that it becomes → how each is traced. config: the module's. manifest: the bundle's.
    """

    name: str
    root: Path
    weights: tuple[Path, ...]
    key: str
    graphs: Mapping[str, type[Graph]]
    config: Mapping[str, Any]
    manifest: Manifest
    load: Callable[[str], torch.nn.Module]

    @property
    def vae(self) -> Mapping[str, Any]:
        return self.config

    @property
    def vae_overflows(self) -> bool:
        overflows = self.manifest.condition("sizes") or self.manifest.low_res_scheduler
        return bool(overflows) and bool(self.config.get("force_upcast", True))

    @property
    def factor(self) -> int:
        return self.manifest.latent.factor

    @property
    def multiple(self) -> int:
        return self.manifest.latent.multiple

    @property
    def scale(self) -> float:
        return self.manifest.latent.scale

    @property
    def shift(self) -> float:
        return self.manifest.latent.shift

    @property
    def max_length(self) -> int:
        return max(text.max_length for text in self.manifest.text)


def open_addition(path: Path, bundle: Bundle, name: str | None = None, encoder: bool = False,
                  config: str | Path | None = None) -> Addition:
    """Look at a diffusers folder of one model, or a single file in the original layout. Nothing is written.

    name: of a ControlNet (the file's or folder's by default). encoder: a VAE replaces the encoder too. config, for a
    single file: as of `export.export`. Raises ExportError for what cannot join `bundle`.
    """
    state = None
    if path.is_dir():
        kind, found = _folder(path, config)
        weights, root = tuple(weight_files(path)), path
    elif path.is_file():
        state = StateDict(path)
        kind, found = _single_file(path, state, bundle, config)
        weights, root = (path,), path.parent
    else:
        raise ExportError(f"{path}: no such file or folder; give a ControlNet or a VAE (nothing is downloaded)")
    model = ControlNetModel if kind == "control" else AutoencoderKL
    found = _with_defaults(model, found)

    def load(source: str) -> torch.nn.Module:
        if state is None:
            return load_folder(path, model)
        return fit(str(path), model, found, convert(_prefixed(state), source, found))

    if kind == "control":
        _require_net(str(path), found, bundle)
        if encoder:
            raise ExportError(f"{path}: got --encoder for a ControlNet, which has none; leave it out")
        key = CONTROL + _net_name(path, name)
        graphs: dict[str, type[Graph]] = {key: ControlNet}
    else:
        _require_vae(str(path), found, bundle)
        if name is not None:
            raise ExportError(f"{path}: got the name {name!r} for a VAE, of which a bundle has one; leave out --as")
        key, graphs = "vae", {"vae_decoder": VAEDecoder, **({"vae_encoder": VAEEncoder} if encoder else {})}
    return Addition(path.resolve().name, root, weights, key, graphs, found, bundle.manifest, load)


def _folder(path: Path, config: str | Path | None) -> tuple[str, dict[str, Any]]:
    if config is not None:
        raise ExportError(f"{path}: got a configuration for a folder, which has its own; leave out --config")
    if not (path / "config.json").is_file():
        inside = "; give the folder of its VAE, PATH/vae" if (path / "model_index.json").is_file() else ""
        raise ExportError(f"{path}: no config.json, expected a diffusers folder of one ControlNetModel or "
                          f"AutoencoderKL{inside}")
    found = read_json(path / "config.json")
    kind = KINDS.get(str(found.get("_class_name")))
    if kind is None:
        raise ExportError(f"{path}: got a {found.get('_class_name')}, expected one of {', '.join(KINDS)}")
    return kind, found


def _single_file(path: Path, state: StateDict, bundle: Bundle,
                 config: str | Path | None) -> tuple[str, dict[str, Any]]:
    """What a file holds, and the configuration of such a module of the bundle's family, or of `config`."""
    if any(name.startswith(PREFIXES["unet"]) for name in state):
        raise ExportError(f"{path}: got a whole checkpoint, expected a ControlNet or a VAE; make a bundle of it with "
                          "-o, or give its VAE as a file or folder of its own")
    kind = next((kind for mark, (kind, _) in _MARKS.items() if mark in state), None)
    if kind is None:
        raise ExportError(f"{path}: no ControlNet or VAE in the original layout; give one of diffusers as a folder, "
                          "with its config.json")
    module = "unet" if kind == "control" else "vae"
    family = config if config is not None else _SHIPPED.get(bundle.manifest.family)
    if family is None:
        raise ExportError(f"{path}: its architecture is not known, as {bundle.path} is of no family that ships with "
                          "latentrt; pass --config DIR, the diffusers folder of the model")
    if str(family) in {*FAMILIES, *_SHIPPED.values()}:
        return kind, read_json(CONFIGS / f"{family}.json")[module]
    if not Path(family).is_dir():
        raise ExportError(f"config: got {str(family)!r}, expected {', '.join(FAMILIES)} or a diffusers folder")
    return kind, read_json(Path(family) / module / "config.json")


def _prefixed(state: StateDict) -> Mapping[str, torch.Tensor]:
    """The weights under the names of a whole checkpoint, which files of a ControlNet or VAE alone may leave out."""
    prefix = next(prefix for mark, (_, prefix) in _MARKS.items() if mark in state)
    return {f"{prefix}{name}": value for name, value in state.items()} if prefix else state


def _with_defaults(model: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """What `model` is made with. A ControlNet has what it shares with its UNet's configuration."""
    parameters = inspect.signature(model.__init__).parameters
    return {name: config.get(name, parameter.default) for name, parameter in parameters.items()
            if parameter.default is not inspect.Parameter.empty}


def _net_name(path: Path, name: str | None) -> str:
    found = name if name is not None else re.sub(r"[^\w-]+", "-", path.resolve().stem, flags=re.ASCII).strip("-_")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", found) or found.endswith(tuple(f"_{part}" for part in PARTS)):
        raise ExportError(f"{path}: got {found!r} for the ControlNet's name, expected letters, digits, - and _ that do "
                          f"not end in {', '.join(f'_{part}' for part in PARTS)}; pass another with --as NAME")
    return found


def _require_net(where: str, config: Mapping[str, Any], bundle: Bundle) -> None:
    """Raise ExportError unless a ControlNet's residuals are those that the bundle's UNet takes."""
    takers = [c for c in bundle.graphs(bundle.denoiser).values() if (c.part, c.variant) == ("", "control")]
    if not takers:
        raise ExportError(f"{bundle.path}: its UNet takes no residuals; export the checkpoint again with this version, "
                          "if it is no upscaler")
    given = {spec.name: spec for spec in takers[0].inputs}
    xl = "text_time" if "text_embeds" in given else None
    factor = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
    rows = [
        ("global_pool_conditions", bool(config["global_pool_conditions"]), False),
        *((key, config[key], None) for key in _UNSUPPORTED),
        ("addition_embed_type", config["addition_embed_type"], xl),
        ("conditioning_channels", config["conditioning_channels"], 3),
        ("in_channels", config["in_channels"], bundle.manifest.latent.channels),
        ("cross_attention_dim", config["cross_attention_dim"], given["encoder_hidden_states"].shape[2]),
        ("pixels a latent", factor, bundle.manifest.latent.factor),
    ]
    if xl:
        sizes = given["time_ids"].shape[1] * config["addition_time_embed_dim"] + given["text_embeds"].shape[1]
        rows.append(("projection_class_embeddings_input_dim", config["projection_class_embeddings_input_dim"], sizes))
    for key, got, expected in rows:
        if got != expected:
            raise ExportError(f"{where}: got a ControlNet with {key}={got!r}, expected {expected!r}; it is of a kind "
                              "that is not supported, or for another model than the bundle's")
    takes = tuple(spec for spec in given.values() if spec.group == RESIDUAL)
    if residual_specs(config) != takes:
        raise ExportError(f"{where}: got a ControlNet of {len(residual_specs(config))} residuals of "
                          f"{config['block_out_channels']} channels, which are not the {len(takes)} that the bundle's "
                          "UNet takes; it is for another model")


def _require_vae(where: str, config: Mapping[str, Any], bundle: Bundle) -> None:
    """Raise ExportError unless a VAE's latents are the bundle's."""
    latent = bundle.manifest.latent
    for key, got, expected in (
            ("latent_channels", config["latent_channels"], latent.channels),
            ("scaling_factor", float(config["scaling_factor"]), latent.scale),
            ("shift_factor", float(config["shift_factor"] or 0), latent.shift),
            ("pixels a latent", 2 ** (len(config["block_out_channels"]) - 1), latent.factor)):
        if got != expected:
            raise ExportError(f"{where}: got a VAE with {key}={got!r}, expected {expected!r}; it is for other latents "
                              "than the bundle's")
