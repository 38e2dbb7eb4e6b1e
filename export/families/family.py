"""Protocols of a family of models, and of any networks that become components of a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from transformers import CLIPTokenizer

from engines.bundle import Component, DimSpec, LatentSpec, Manifest, resolve_dims
from export.sources.checkpoint import Checkpoint
from export.trace.traced_module import TracedModule


class Model(Protocol):
    """Networks that become components of a bundle, before any weight is read."""

    @property
    def name(self) -> str:
        """Name of the file or folder that it comes from."""
        ...

    @property
    def root(self) -> Path:
        """The folder of `weights`."""
        ...

    @property
    def weights(self) -> tuple[Path, ...]:
        """Files that hold the weights of its networks."""
        ...

    @property
    def modules(self) -> Mapping[str, Callable[[], TracedModule]]:
        """Network → what loads the module that it is traced from, in float32. The call raises ExportError."""
        ...

    def sizes(self, check: bool) -> dict[str, int]:
        """Return the dimensions to trace at, or to check at: they differ in all, which shows what was fixed by mistake.
        """
        ...

    def precision(self, network: str, dtype: str) -> str:
        """Return the precision that a network has in a bundle of `dtype`."""
        ...


class Family(Model, Protocol):
    """A whole model of one family, and all that the family knows of it.

    pipelines: classes of diffusers that draw with models of this family. title: the family in words, for errors.
    """

    pipelines: ClassVar[tuple[str, ...]]
    title: ClassVar[str]

    @classmethod
    def recognises(cls, checkpoint: Checkpoint) -> bool:
        """Return whether a checkpoint is of this family."""
        ...

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> Self:
        """Read the configurations of a checkpoint of this family. Raises ExportError for what is not supported."""
        ...

    @property
    def tokenizers(self) -> Mapping[str, CLIPTokenizer]:
        """File in the bundle → the tokenizer that is saved there."""
        ...

    def manifest(self, components: Mapping[str, Component], files: Mapping[str, str],
                 provenance: Mapping[str, Any]) -> Manifest:
        """Return the manifest of a bundle of these components. files: those of no component → sha256."""
        ...


def latent_sizes(latent: LatentSpec, dims: Mapping[str, DimSpec], tokens: int, check: bool) -> dict[str, int]:
    """Return `Model.sizes` of a model that draws latents and is given text of `tokens` a prompt.

    dims: the dimensions that follow from others.
    """
    unit = latent.multiple * latent.factor
    batch, height, width, sequence = (3, unit, 2 * unit, tokens) if check else (2, 3 * unit, 4 * unit, 2 * tokens)
    given = {"batch": batch, "height": height, "width": width, "sequence": sequence}
    return resolve_dims([*given, *dims], given, dims)
