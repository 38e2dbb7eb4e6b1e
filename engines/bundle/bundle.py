"""An opened bundle, and what engines and the runtime ask of it: graphs by role, network, part and variant, sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.bundle.dims import resolve_dims, size_of
from engines.bundle.files import verify_files
from engines.bundle.manifest import MANIFEST, STEPS, Component, Manifest, read_manifest
from engines.spec import EngineConfig, EngineError


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. path: its directory. manifest: what that says of the model."""

    path: Path
    manifest: Manifest = field(repr=False)

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read `path`/manifest.json. Raises EngineError where it is missing, damaged or of another format."""
        path = Path(path)
        if not (path / MANIFEST).is_file():
            there = "a file" if path.is_file() else "a directory without one" if path.is_dir() else "nothing"
            raise EngineError(f"{path}: got {there}, expected a bundle (a directory with {MANIFEST}); "
                              f"make one with: python -m export CHECKPOINT -o {path}")
        return cls(path, read_manifest(path))

    def component(self, name: str) -> Component:
        """Return a component. Raises EngineError for one that the bundle does not have."""
        try:
            return self.manifest.components[name]
        except KeyError as e:
            raise EngineError(f"{self.path}: got component {name!r}, "
                              f"expected one of {', '.join(self.manifest.components)}") from e

    def graphs(self, network: str) -> dict[str, Component]:
        """Return name → component of all graphs of a network: whole, parts and variants."""
        return {name: c for name, c in self.manifest.components.items() if c.network == network}

    def graph(self, network: str, part: str = "", variant: str = "") -> tuple[str, Component]:
        """Return the component, and its name, of one graph of a network. Raises EngineError where there is none."""
        for name, component in self.graphs(network).items():
            if (component.part, component.variant) == (part, variant):
                return name, component
        raise EngineError(f"{self.path}: got no graph of network {network!r} with part {part!r} and variant "
                          f"{variant!r}, expected one; export the checkpoint again: python -m export CHECKPOINT "
                          f"-o {self.path} --force")

    def of_role(self, role: str) -> tuple[str, ...]:
        """Return the networks of a role, in the order of their components."""
        return tuple({c.network: None for c in self.manifest.components.values() if c.role == role})

    def network(self, role: str) -> str:
        """Return the network of a role, the first of several. Raises EngineError where the bundle has none."""
        networks = self.of_role(role)
        if not networks:
            raise EngineError(f"{self.path}: got no {role}, expected one; export a checkpoint that has it")
        return networks[0]

    @property
    def denoiser(self) -> str:
        """The network that the loop runs at every step."""
        return self.network(STEPS[self.manifest.loop])

    @property
    def dtype(self) -> str:
        """The precision of the denoiser's graphs."""
        return next(iter(self.graphs(self.denoiser).values())).dtype

    @property
    def labels(self) -> tuple[str, ...]:
        """The names that requests have for networks which were attached."""
        return tuple({c.label: None for c in self.manifest.components.values() if c.label})

    def label(self, label: str) -> str:
        """Return the network that requests call `label`. Raises EngineError where there is none."""
        for component in self.manifest.components.values():
            if label and component.label == label:
                return component.network
        raise EngineError(f"{self.path}: got {label!r}, expected one that is attached "
                          f"({', '.join(self.labels) or 'none is'})")

    @property
    def tokens(self) -> int:
        """The tokens of one prompt, as the denoiser is given it; 0 where it is given no text."""
        return max((text.max_length for text in self.manifest.text), default=0)

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError, naming the nearest size that fits, unless the model can draw height x width pixels."""
        latent = self.manifest.latent
        step = latent.factor * latent.multiple
        if min(height, width) < step or height % step or width % step:
            near = "x".join(str(max(step, round(side / step) * step)) for side in (height, width))
            raise ValueError(f"size: got {height}x{width} (height x width), expected multiples of {step} pixels "
                             f"({latent.factor} pixels a latent x {latent.multiple} latents); try {near}")

    def config(self, name: str, *, backend: str, batch: int, size: tuple[int, int] | None = None, tokens: int = 0,
               sizes: Mapping[str, int] | None = None, **rest: Any) -> EngineConfig:
        """Return the EngineConfig of component `name` for `batch` rows, with the dimensions that the component has.

        size: (height, width) of the picture in pixels; a component without these needs none, so that one text encoder
        serves every picture size. tokens: of the text; 0 for those of one prompt. sizes: further dimensions by name,
        where they are not to be what the manifest says. rest: the other fields of EngineConfig. Raises EngineError for
        a dimension whose size is not known.
        """
        height, width = size or (0, 0)
        given = {"height": height, "width": width, "sequence": tokens or self.tokens, **(sizes or {})}
        given = {"batch": batch, **{dim: value for dim, value in given.items() if value}}
        try:
            dims = resolve_dims(self.component(name).dims, given, self.manifest.dims)
        except EngineError as e:
            raise EngineError(f"component {name}: {e}") from e
        return EngineConfig(backend, dims, **rest)

    def picture_size(self, config: EngineConfig) -> tuple[int, int] | None:
        """Return (height, width) in pixels of the pictures that an engine is for; None where it is for any."""
        height, width = (size_of(side, config.dims, self.manifest.dims) for side in ("height", "width"))
        return (height, width) if height and width else None

    def verify(self, files: Mapping[str, str]) -> None:
        """Hash `files` (relative path → sha256). Raises EngineError naming the first that is missing or differs."""
        verify_files(self.path, files, f"export it again: python -m export CHECKPOINT -o {self.path} --force")
