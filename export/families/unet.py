"""The UNet of Stable Diffusion as a graph."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from engines.spec import TensorSpec
from export.families.extensions import across_frames, with_residuals
from export.trace.traced_module import Cut, Extension, TracedModule

TIMESTEPS = (0, 1000)
"""Span of the timesteps, and of the sizes in pixels, that a graph is checked with."""
CUTS = (Cut("text", ("encoder_hidden_states", "class_labels", "text_embeds", "time_ids"), rows=2),
        Cut("time", ("timestep",), rows=32))
"""Parts of a UNet, and of what is computed like one: once for the two prompts, and for the timesteps of a schedule."""


class UNet(TracedModule):
    """Noisy latents, a timestep for each row, and text → the model's prediction, as `prediction_type` says.

    Some models are given more, as inputs of their own:
    * channels that are joined to the latents in here: mask and masked_image, depth, or low_resolution;
    * class_labels, the level of the noise in low_resolution (the x4 upscaler);
    * text_embeds, the pooled text, and time_ids, numbers such as sizes (Stable Diffusion XL), whose embedding is added
      to that of the timestep.
    """

    source = "unet"
    role = "denoiser"
    rows = "branch"
    cuts = CUTS

    def __init__(self, model: nn.Module, channels: int, joined: Mapping[str, int], pooled: int = 0,
                 numbers: int = 0) -> None:
        """Wrap a UNet. channels: of the latents. joined: further inputs → their channels. pooled: width of text_embeds,
        numbers: how many time_ids, both 0 without these inputs.
        """
        super().__init__(model)
        latent, labels = ("latent_height", "latent_width"), model.config.get("num_class_embeds")
        self.inputs = (
            TensorSpec("sample", "float32", ("batch", channels, *latent)),
            TensorSpec("timestep", "float32", ("batch",), span=TIMESTEPS),
            TensorSpec("encoder_hidden_states", "float32", ("batch", "sequence", model.config["cross_attention_dim"])),
            *(TensorSpec(name, "float32", ("batch", count, *latent)) for name, count in joined.items()))
        if labels:
            self.inputs += (TensorSpec("class_labels", "int64", ("batch",)),)
            self.below = {"class_labels": labels}
        if numbers:
            self.inputs += (TensorSpec("text_embeds", "float32", ("batch", pooled)),
                            TensorSpec("time_ids", "float32", ("batch", numbers), span=TIMESTEPS))
        self.outputs = (TensorSpec("noise_pred", "float32", ("batch", channels, *latent)),)

    @property
    def extensions(self) -> tuple[Extension, ...]:
        """Graphs beside the plain one: none of an upscaler, which is what class labels are for, and none for videos of
        a UNet that takes more than latents.
        """
        if "class_labels" in self.below:
            return ()
        control = with_residuals(self.model)
        alone = self.model.config["in_channels"] == self.model.config["out_channels"]
        return (control, across_frames(self.model)) if alone else (control,)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor,
                mask: torch.Tensor | None = None, masked_image: torch.Tensor | None = None,
                depth: torch.Tensor | None = None, low_resolution: torch.Tensor | None = None,
                class_labels: torch.Tensor | None = None, text_embeds: torch.Tensor | None = None,
                time_ids: torch.Tensor | None = None) -> torch.Tensor:
        extra = [channels for channels in (mask, masked_image, depth, low_resolution) if channels is not None]
        added = None
        if text_embeds is not None:  # float32: in bfloat16 sizes of 1023 would be 1024, and ONNX joins one type only
            added = {"text_embeds": text_embeds, "time_ids": time_ids}
        joined = torch.cat([sample, *extra], dim=1) if extra else sample
        return self.model(joined.to(self.dtype), timestep, encoder_hidden_states.to(self.dtype),
                          class_labels=class_labels, added_cond_kwargs=added, return_dict=False)[0].float()
