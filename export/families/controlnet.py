"""ControlNet (Zhang et al., 2023, arXiv 2302.05543) as a graph, and what one must be to steer a bundle's UNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from engines.bundle import Bundle
from engines.spec import TensorSpec
from export.errors import ExportError
from export.families.levels import RESIDUAL, residual_specs
from export.families.unet import CUTS, TIMESTEPS
from export.trace.traced_module import Cut, TracedModule

TIME_IDS = 6
"""Numbers that a net of Stable Diffusion XL takes beside the pooled text, as the base model does."""

PARTS = ("text", "time", "hint", "body")
"""Parts that a net is cut into; the names of their graphs end in these."""

_UNSUPPORTED = ("class_embed_type", "encoder_hid_dim_type", "num_class_embeds")


class ControlNet(TracedModule):
    """Latents, timestep, text and a hint (a picture, RGB in [0, 1]) → the residuals of `residual_specs`.

    scale: float32 [batch], what every residual of a row is multiplied by; 0 is as if there were no net. A net of Stable
    Diffusion XL takes text_embeds and time_ids as its UNet does.
    """

    source = "control"
    role = "controlnet"
    rows = "branch"

    def __init__(self, model: nn.Module, label: str) -> None:
        """Wrap a net. label: its name in requests."""
        super().__init__(model)
        self.label = label
        config, latent = model.config, ("latent_height", "latent_width")
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
        self.cuts = (*CUTS, Cut("hint", ("hint",), rows=1, shape=("batch", config["block_out_channels"][0], *latent)))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor,
                hint: torch.Tensor, scale: torch.Tensor, text_embeds: torch.Tensor | None = None,
                time_ids: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        skips, middle = self.model(sample.to(self.dtype), timestep, encoder_hidden_states.to(self.dtype),
                                   hint.to(self.dtype), added_cond_kwargs=added, return_dict=False)
        return tuple(residual.float() * scale[:, None, None, None] for residual in (*skips, middle))


def require_same_residuals(where: str, config: Mapping[str, Any], bundle: Bundle) -> None:
    """Raise ExportError unless a ControlNet's residuals are those that the bundle's UNet takes."""
    latent, graphs = bundle.manifest.latent, bundle.graphs(bundle.denoiser).values()
    takers = [graph for graph in graphs if (graph.part, graph.variant) == ("", "control")]
    if not takers:
        raise ExportError(f"{bundle.path}: its UNet takes no residuals; export the checkpoint again with this version, "
                          "if it is no upscaler")
    given = {spec.name: spec for spec in takers[0].inputs}
    xl = "text_time" if "text_embeds" in given else None
    rows = [
        ("global_pool_conditions", bool(config["global_pool_conditions"]), False),
        *((key, config[key], None) for key in _UNSUPPORTED),
        ("addition_embed_type", config["addition_embed_type"], xl),
        ("conditioning_channels", config["conditioning_channels"], 3),
        ("in_channels", config["in_channels"], latent.channels),
        ("cross_attention_dim", config["cross_attention_dim"], given["encoder_hidden_states"].shape[2]),
        ("pixels a latent", 2 ** (len(config["conditioning_embedding_out_channels"]) - 1), latent.factor),
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
