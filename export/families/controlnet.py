"""ControlNet (Zhang et al., 2023, arXiv 2302.05543): the net as a graph, and the UNet that takes its residuals.

A ControlNet gives a residual for every skip connection of the UNet and one for its middle. A bundle holds the UNet with
and without them, two graphs on one weights file: what a request without a ControlNet runs is as if there were none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import nn

from engines.spec import TensorSpec
from export.errors import ExportError
from export.families.stable_diffusion import TIMESTEPS, Graph, UNet
from export.sources.checkpoint import Checkpoint
from export.trace.trace import count_sites

RESIDUAL = "residual"
"""Group of the tensors that ControlNets give and the UNet adds."""

TIME_IDS = 6
"""Numbers that a net of Stable Diffusion XL takes beside the pooled text, as the base model does."""


def residual_specs(config: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    """residual_0 … of a UNet or ControlNet of this configuration: the skip connections in the order in which they are
    made, then the middle; float32 [batch, C, h, w], halved in size at each level.
    """
    channels, layers = config["block_out_channels"], config.get("layers_per_block", 2)
    layers = [layers] * len(channels) if isinstance(layers, int) else layers
    shapes = [(channels[0], 0)]
    for level, (width, count) in enumerate(zip(channels, layers, strict=True)):
        shapes += [(width, level)] * count
        if level + 1 < len(channels):
            shapes.append((width, level + 1))
    shapes.append((channels[-1], len(channels) - 1))
    return tuple(TensorSpec(f"{RESIDUAL}_{n}", "float32", ("batch", width, *level_size(level)), RESIDUAL)
                 for n, (width, level) in enumerate(shapes))


def level_size(level: int) -> tuple[str, str]:
    """Names of the dimensions of a level of a UNet, 0 for that of the latents."""
    end = f"_{2 ** level}" if level else ""
    return f"latent_height{end}", f"latent_width{end}"


class ControlNet(Graph):
    """Latents, timestep, text and a hint (a picture, RGB in [0, 1]) → the residuals of `residual_specs`.

    scale: float32 [batch], what every residual of a row is multiplied by; 0 is as if there were no net. A net of Stable
    Diffusion XL takes text_embeds and time_ids as its UNet does.
    """

    source = "control"
    invariant: ClassVar = {**UNet.invariant, "hint": ("hint",)}

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        super().__init__(model, checkpoint)
        config = model.config
        latent = ("latent_height", "latent_width")
        self.inputs = (TensorSpec("sample", "float32", ("batch", config["in_channels"], *latent)),
                       TensorSpec("timestep", "float32", ("batch",), span=TIMESTEPS),
                       TensorSpec("encoder_hidden_states", "float32",
                                  ("batch", "sequence", config["cross_attention_dim"])),
                       TensorSpec("hint", "float32", ("batch", 3, "height", "width")),
                       TensorSpec("scale", "float32", ("batch",)))
        if config["addition_embed_type"] == "text_time":
            pooled = config["projection_class_embeddings_input_dim"] - TIME_IDS * config["addition_time_embed_dim"]
            self.inputs += (TensorSpec("text_embeds", "float32", ("batch", pooled)),
                            TensorSpec("time_ids", "float32", ("batch", TIME_IDS), span=TIMESTEPS))
        self.outputs = residual_specs(config)
        self.shapes = {"hint": ("batch", config["block_out_channels"][0], *latent)}

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor,
                hint: torch.Tensor, scale: torch.Tensor, text_embeds: torch.Tensor | None = None,
                time_ids: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        skips, middle = self.model(sample.to(self.dtype), timestep, encoder_hidden_states.to(self.dtype),
                                   hint.to(self.dtype), added_cond_kwargs=added, return_dict=False)
        return tuple(residual.float() * scale[:, None, None, None] for residual in (*skips, middle))


@contextlib.contextmanager
def adding(model: nn.Module, given: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Let diffusers' UNet add residuals wherever it is called in the block: what `add_residuals` is compared with.

    given: by name, among others. Yields what the model gives beside its output: nothing.
    """
    *skips, middle = (value for name, value in given.items() if name.startswith(f"{RESIDUAL}_"))
    more = {"down_block_additional_residuals": tuple(skips), "mid_block_additional_residual": middle}
    handle = model.register_forward_pre_hook(lambda _, args, named: (args, named | more), with_kwargs=True)
    try:
        yield {}
    finally:
        handle.remove()


def add_residuals(residuals: Sequence[TensorSpec], file: Path, target: Path) -> dict[str, int]:
    """Write the UNet in `file`, whole or its body, with inputs `residuals` to `target`; returns its kernel sites.

        cat([x, skip_n])  ─▶  cat([x, skip_n + residual_n])      and the x of the first of them + the last residual

    Each resnet on the way up joins its input and a skip connection along the channels, the skips in reverse order, and
    the first of these inputs is what comes from the middle. The weights stay in `file`'s. Raises ExportError where the
    graph does not join as many as there are residuals.
    """
    model = ir.load(file)
    common.ShapeInferencePass()(model)  # for the dtypes
    joins = [node for node in model.graph if node.op_type == "Concat" and len(node.inputs) == 2
             and node.attributes["axis"].as_int() == 1][1 - len(residuals):]
    if len(joins) != len(residuals) - 1:
        raise ExportError(f"{file.name}: the graph joins {len(joins)} skip connections, expected {len(residuals) - 1}; "
                          "this version of PyTorch or diffusers computes the UNet in another way")
    places = [*((join, 1) for join in reversed(joins)), (joins[0], 0)]
    for spec, (join, side) in zip(residuals, places, strict=True):
        x = join.inputs[side]
        residual = ir.Value(name=spec.name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(spec.shape))
        model.graph.inputs.append(residual)
        nodes = [ir.node("Cast", [residual], {"to": x.dtype})] if x.dtype != ir.DataType.FLOAT else []
        nodes.append(ir.node("Add", [x, nodes[0].outputs[0] if nodes else residual]))
        for n, node in enumerate(nodes):
            node.name = node.outputs[0].name = f"{spec.name}_{'added' if n + 1 == len(nodes) else 'narrow'}"
            node.outputs[0].dtype = x.dtype
        model.graph.insert_before(join, nodes)
        join.replace_input_with(side, nodes[-1].outputs[0])
    ir.save(model, target)
    return count_sites(model.graph)
