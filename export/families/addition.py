"""Networks that join a bundle after its export: a ControlNet, or a VAE in the place of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from engines.bundle import Bundle, Manifest
from export.errors import ExportError
from export.families.autoencoder import VAEDecoder, VAEEncoder, require_same_latents
from export.families.autoencoder import precision as vae_precision
from export.families.controlnet import PARTS, ControlNet, require_same_residuals
from export.families.family import latent_sizes
from export.sources.single_module import SingleModule, open_module
from export.trace.traced_module import TracedModule


@dataclass(frozen=True)
class Addition:
    """A network before its weights are read, for a bundle: an `export.families.family.Model`.

    key: what its files begin with, "vae" or the ControlNet's network. modules: network → what loads the module that it
    is traced from. manifest: the bundle's.
    """

    module: SingleModule
    key: str
    modules: Mapping[str, Callable[[], TracedModule]]
    manifest: Manifest

    @property
    def name(self) -> str:
        return self.module.name

    @property
    def root(self) -> Path:
        return self.module.root

    @property
    def weights(self) -> tuple[Path, ...]:
        return self.module.weights

    def sizes(self, check: bool) -> dict[str, int]:
        return latent_sizes(self.manifest.latent, self.manifest.dims,
                            max(text.max_length for text in self.manifest.text), check)

    def precision(self, network: str, dtype: str) -> str:
        if network not in ("vae_decoder", "vae_encoder"):
            return dtype
        wide = bool(self.manifest.condition("sizes") or self.manifest.low_res_scheduler)
        return vae_precision(self.module.config, dtype, wide)


def open_addition(path: Path, bundle: Bundle, name: str | None = None, encoder: bool = False,
                  config: str | Path | None = None) -> Addition:
    """Look at a diffusers folder of one network, or a single file in the original layout. Nothing is written.

    name: of a ControlNet (the file's or folder's by default). encoder: a VAE replaces the encoder too. config, for a
    single file: as of `export.export`. Raises ExportError for what cannot join `bundle`.
    """
    module = open_module(path, bundle, config)
    add = _net if module.kind == "ControlNetModel" else _vae
    return add(module, bundle, name, encoder)


def _net(module: SingleModule, bundle: Bundle, name: str | None, encoder: bool) -> Addition:
    require_same_residuals(str(module.path), module.config, bundle)
    if encoder:
        raise ExportError(f"{module.path}: got --encoder for a ControlNet, which has none; leave it out")
    label = _net_name(module.path, name)
    network = f"control_{label}"
    return Addition(module, network, {network: lambda: ControlNet(module.load(), label)}, bundle.manifest)


def _net_name(path: Path, name: str | None) -> str:
    found = name if name is not None else re.sub(r"[^\w-]+", "-", path.resolve().stem, flags=re.ASCII).strip("-_")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", found) or found.endswith(tuple(f"_{part}" for part in PARTS)):
        raise ExportError(f"{path}: got {found!r} for the ControlNet's name, expected letters, digits, - and _ that do "
                          f"not end in {', '.join(f'_{part}' for part in PARTS)}; pass another with --as NAME")
    return found


def _vae(module: SingleModule, bundle: Bundle, name: str | None, encoder: bool) -> Addition:
    latent = bundle.manifest.latent
    require_same_latents(str(module.path), module.config, latent)
    if name is not None:
        raise ExportError(f"{module.path}: got the name {name!r} for a VAE, of which a bundle has one; leave out --as")
    modules: dict[str, Callable[[], TracedModule]] = {"vae_decoder": lambda: VAEDecoder(module.load(), latent)}
    if encoder:
        modules["vae_encoder"] = lambda: VAEEncoder(module.load(), latent)
    return Addition(module, "vae", modules, bundle.manifest)
