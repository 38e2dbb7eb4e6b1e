"""Families of models: the only place of export that knows any. docs/extending.md says how to add one."""

from __future__ import annotations

from export.errors import ExportError
from export.families.family import Family
from export.families.stable_diffusion import StableDiffusion
from export.sources.checkpoint import Checkpoint

FAMILIES: tuple[type[Family], ...] = (StableDiffusion,)
"""Families that can be exported, in the order in which a checkpoint is shown to them."""


def open_model(checkpoint: Checkpoint) -> Family:
    """Read a checkpoint as the family that recognises it does. Raises ExportError where none does, or it refuses."""
    for family in FAMILIES:
        if family.recognises(checkpoint):
            return family.read(checkpoint)
    known = ", ".join(name for family in FAMILIES for name in family.pipelines)
    raise ExportError(f"{checkpoint.root}: got a {checkpoint.pipeline}, expected one of {known}; "
                      f"only {' and '.join(family.title for family in FAMILIES)} are supported today")
