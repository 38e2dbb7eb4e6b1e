"""Graphs that a bundle has of one UNet beside the plain one, each with more inputs and outputs, on the same weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from engines.spec import TensorSpec
from export.families.controlnet import add_residuals, adding, residual_specs
from export.passes.frames import add_frames, crossing, frame_specs, layers

Arrays = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Variant:
    """A graph made of another by a pass: unet_KEY, and its body.

    base: the key of what it is made of, "" for the plain UNet. inputs, outputs: what it has beside the plain one's.
    write: the pass, from a file to a file, which returns the sites. eager: lets the PyTorch model be given these inputs
    wherever it is called in the block, and yields these outputs.
    """

    key: str
    base: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    write: Callable[[Path, Path], dict[str, int]]
    eager: Callable[[nn.Module, Arrays], AbstractContextManager[Arrays]]


def variants(model: nn.Module) -> tuple[Variant, ...]:
    """Those of a UNet of diffusers: none of an upscaler, which is what class labels are for, and none for videos of one
    that takes more than latents."""
    if model.config.get("num_class_embeds") is not None:
        return ()
    residuals = residual_specs(model.config)
    control = Variant("control", "", residuals, (), partial(add_residuals, residuals), adding)
    if model.config["in_channels"] != model.config["out_channels"]:
        return (control,)
    given, gives = frame_specs(model)
    write = partial(add_frames, tuple(layers(model)), given, gives)
    return control, Variant("frames", "control", (*residuals, *given), gives, write, _across)


@contextlib.contextmanager
def _across(model: nn.Module, given: Arrays) -> Iterator[Arrays]:
    with adding(model, given), crossing(model, given) as found:
        yield found
