"""Graphs of a UNet beside the plain one: with residuals of ControlNets, and for the frames of a video.

All lie on one weights file, so that what a request without a ControlNet runs is as if there were none. That for frames
takes residuals as well.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from functools import partial

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from engines.spec import TensorSpec
from export.families.levels import level_size, residual_specs
from export.passes.frames import FrameSpecs, add_frames
from export.passes.residuals import add_residuals
from export.trace.traced_module import Arrays, Extension

STORE, FIRST, PREVIOUS, HIDDEN = "store", "first", "previous", "hidden"
"""Groups of the tensors that the graph for frames has beside the UNet's own."""

_LAYER = re.compile(r"up_blocks\.(\d+)\..*\.attn1")


def with_residuals(unet: nn.Module) -> Extension:
    """Return the graph of a UNet of diffusers that takes the residuals of ControlNets."""
    residuals = residual_specs(unet.config)
    return Extension("control", "", residuals, (), partial(add_residuals, residuals), _adding)


def across_frames(unet: nn.Module) -> Extension:
    """Return the graph of a UNet of diffusers that attends to other frames of a video, and takes residuals."""
    residuals, specs = residual_specs(unet.config), frame_specs(unet)
    return Extension("frames", "control", (*residuals, *specs.inputs), specs.hidden,
                     partial(add_frames, tuple(_layers(unet)), specs), _crossing)


def frame_specs(unet: nn.Module) -> FrameSpecs:
    """Return what the graph for frames takes and gives for each self-attention of a UNet's way up."""
    shapes = []
    for name, layer in _layers(unet).items():
        match = _LAYER.fullmatch(name)
        assert match
        level = len(unet.config["block_out_channels"]) - 1 - int(match[1])
        shapes.append(("batch", *level_size(level), layer.to_k.in_features))

    def specs(group: str) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(f"{group}_{n}", "float32", shape, group) for n, shape in enumerate(shapes))

    return FrameSpecs(TensorSpec(STORE, "float32", ("batch",), STORE), specs(FIRST), specs(PREVIOUS), specs(HIDDEN))


def _layers(unet: nn.Module) -> dict[str, Attention]:
    """Return the self-attention of a UNet's way up by name, in the order in which it runs."""
    return {name: module for name, module in unet.named_modules()
            if _LAYER.fullmatch(name) and isinstance(module, Attention)}


@contextlib.contextmanager
def _adding(unet: nn.Module, given: Arrays) -> Iterator[Arrays]:
    """Let diffusers' UNet add residuals wherever it is called in the block. It gives nothing beside its output."""
    *skips, middle = (given[spec.name] for spec in residual_specs(unet.config))
    more = {"down_block_additional_residuals": tuple(skips), "mid_block_additional_residual": middle}
    handle = unet.register_forward_pre_hook(lambda _, args, named: (args, named | more), with_kwargs=True)
    try:
        yield {}
    finally:
        handle.remove()


@contextlib.contextmanager
def _crossing(unet: nn.Module, given: Arrays) -> Iterator[Arrays]:
    """Let diffusers' UNet attend across frames, and add residuals, in the block.

    Yields what it gives beside its output, which is there once it has run.
    """
    found: dict[str, torch.Tensor] = {}
    layers = _layers(unet)
    before = [layer.processor for layer in layers.values()]
    try:
        for n, layer in enumerate(layers.values()):
            layer.set_processor(_AcrossFrames(n, given, found))
        with _adding(unet, given):
            yield found
    finally:
        for layer, processor in zip(layers.values(), before, strict=True):
            layer.set_processor(processor)


class _AcrossFrames:
    """Attention of layer n across frames in PyTorch, as a processor of diffusers."""

    def __init__(self, n: int, given: Arrays, found: dict[str, torch.Tensor]) -> None:
        self.n, self.given, self.found = n, given, found

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
                 attention_mask: torch.Tensor | None = None, temb: torch.Tensor | None = None) -> torch.Tensor:
        first, previous = self.given[f"{FIRST}_{self.n}"], self.given[f"{PREVIOUS}_{self.n}"]
        own = self.given[STORE] > 0.5
        self.found[f"{HIDDEN}_{self.n}"] = hidden_states.reshape(first.shape)
        both = [torch.where(own[:, None, None], hidden_states, other.flatten(1, 2)) for other in (first, previous)]
        told = torch.cat(both, dim=1)
        q, k, v = (project(x).unflatten(2, (attn.heads, -1)).transpose(1, 2) for project, x in
                   ((attn.to_q, hidden_states), (attn.to_k, told), (attn.to_v, told)))
        out = nn.functional.scaled_dot_product_attention(q, k, v, scale=attn.scale).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)
