"""The graphs of a bundle as PyTorch modules: float32 in and out, whatever the model's dtype.

Each graph says its inputs and outputs, in the dimension names of `engines.EngineConfig.dims`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.models.clip.modeling_clip import CLIPEncoder

from engines.spec import TensorSpec
from export.sources.checkpoint import Checkpoint

TIMESTEPS = (0, 1000)
"""Span of the timesteps, and of the sizes in pixels, that a graph is checked with."""


class Graph(nn.Module):
    """One component: `model` is what it wraps, and the rest describes what goes in and out."""

    source = ""
    """Which of the checkpoint's modules it wraps."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    invariant: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Part of the graph that `export.passes.hoist` cuts out → inputs that it may depend on."""
    shapes: Mapping[str, tuple[int | str, ...]] = MappingProxyType({})
    """Part → the shape of what it hands over, where ONNX cannot infer it."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.model = model
        self.checkpoint = checkpoint

    @property
    def used(self) -> nn.Module:
        """The part of the model that this graph computes."""
        return self.model

    def run(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Outputs for `inputs`, in the order of the specs."""
        outputs = self(**dict(zip([spec.name for spec in self.inputs], inputs, strict=True)))
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def call(self, inputs: Sequence[torch.Tensor], shapes: Sequence[Mapping[int, str]]) -> dict[str, Any]:
        """How PyTorch's exporter is given inputs and their symbolic dimensions."""
        names = [spec.name for spec in self.inputs]
        return {"kwargs": dict(zip(names, inputs, strict=True)),
                "dynamic_shapes": dict(zip(names, shapes, strict=True))}

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def example(self, dims: Mapping[str, int], seed: int) -> tuple[torch.Tensor, ...]:
        """Random inputs: standard normal, token ids and labels in their range, timesteps and sizes in [0, 1000)."""
        generator = torch.Generator().manual_seed(seed)
        values = []
        for spec in self.inputs:
            shape = [d if isinstance(d, int) else dims[d] for d in spec.shape]
            if spec.name == "input_ids":
                size = min(text.config["vocab_size"] for text in self.checkpoint.texts)
                values.append(torch.randint(size, shape, generator=generator))
            elif spec.name == "class_labels":
                values.append(torch.randint(self.checkpoint.unet["num_class_embeds"], shape, generator=generator))
            elif spec.span is not None:
                low, high = spec.span
                values.append(torch.rand(shape, generator=generator) * (high - low) + low)
            else:
                values.append(torch.randn(shape, generator=generator))
        return tuple(values)


class TextEncoder(Graph):
    """Token ids → the hidden states that the UNet attends to (the last layer, after the final norm).

    Where `placed` is above 0 the vector of the token is that of `embeddings` (textual inversion, arXiv 2208.01618).
    """

    source = "text_encoder"

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        super().__init__(model, checkpoint)
        self.config = {text.name: text.config for text in checkpoint.texts}[self.source]
        length, width = checkpoint.max_length, self.config["hidden_size"]
        self.inputs = (TensorSpec("input_ids", "int64", ("batch", length)),
                       TensorSpec("embeddings", "float32", ("batch", length, width)),
                       TensorSpec("placed", "float32", ("batch", length)))
        self.outputs = (TensorSpec("hidden_states", "float32", ("batch", length, width)),)

    def forward(self, input_ids: torch.Tensor, embeddings: torch.Tensor,
                placed: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        with self._placing(embeddings, placed):
            return self.model(input_ids).last_hidden_state.float()

    @contextlib.contextmanager
    def _placing(self, embeddings: torch.Tensor, placed: torch.Tensor) -> Iterator[None]:
        def place(module: nn.Module, args: object, tokens: torch.Tensor) -> torch.Tensor:
            return torch.where(placed[..., None] > 0, embeddings.to(tokens.dtype), tokens)

        hook = self.model.get_input_embeddings().register_forward_hook(place)
        try:
            yield
        finally:
            hook.remove()


class FirstXLTextEncoder(TextEncoder):
    """Token ids → the last hidden states but one, without a norm; the last layer is left out."""

    @property
    def used(self) -> nn.Module:
        encoder = next(module for module in self.model.modules() if isinstance(module, CLIPEncoder))
        return nn.ModuleList(encoder.layers[:-1])

    def forward(self, input_ids: torch.Tensor, embeddings: torch.Tensor, placed: torch.Tensor) -> torch.Tensor:
        with self._placing(embeddings, placed):
            return self.model(input_ids, output_hidden_states=True).hidden_states[-2].float()


class SecondXLTextEncoder(TextEncoder):
    """Token ids → the last hidden states but one, and the projected last state of the end token (the pooled text).

    The end token is found by its id; that of a token whose vector is placed is 0.
    """

    source = "text_encoder_2"

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        super().__init__(model, checkpoint)
        self.outputs += (TensorSpec("text_embeds", "float32", ("batch", self.config["projection_dim"])),)

    def forward(self, input_ids: torch.Tensor, embeddings: torch.Tensor,
                placed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with self._placing(embeddings, placed):
            encoded = self.model(input_ids, output_hidden_states=True)
        return encoded.hidden_states[-2].float(), encoded.text_embeds.float()


class UNet(Graph):
    """Noisy latents, a timestep for each row, and text → the model's prediction, as `prediction_type` says.

    What other models are given comes as inputs of its own, too:
    * extra channels (`Checkpoint.extra_channels`), joined to the latents in here;
    * class_labels, the level of the noise in low_resolution (the x4 upscaler);
    * text_embeds, the pooled text, and time_ids, the numbers of `Checkpoint.time_ids` (Stable Diffusion XL), whose
      embedding is added to that of the timestep.
    """

    source = "unet"
    invariant: ClassVar = {"text": ("encoder_hidden_states", "class_labels", "text_embeds", "time_ids"),
                           "time": ("timestep",)}

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        super().__init__(model, checkpoint)
        latent, channels = ("latent_height", "latent_width"), checkpoint.vae["latent_channels"]
        width = checkpoint.unet["cross_attention_dim"]
        self.inputs = (
            TensorSpec("sample", "float32", ("batch", channels, *latent)),
            TensorSpec("timestep", "float32", ("batch",), span=TIMESTEPS),
            TensorSpec("encoder_hidden_states", "float32", ("batch", "sequence", width)),
            *(TensorSpec(extra.meaning, "float32", ("batch", extra.channels, *latent))
              for extra in checkpoint.extra_channels))
        if checkpoint.unet.get("num_class_embeds"):
            self.inputs += (TensorSpec("class_labels", "int64", ("batch",)),)
        if checkpoint.time_ids:
            self.inputs += (TensorSpec("text_embeds", "float32", ("batch", checkpoint.pooled_width)),
                            TensorSpec("time_ids", "float32", ("batch", checkpoint.time_ids), span=TIMESTEPS))
        self.outputs = (TensorSpec("noise_pred", "float32", ("batch", channels, *latent)),)

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


class VAEDecoder(Graph):
    """Latents as the UNet knows them → picture, nominally in [-1, 1] and not clamped."""

    source = "vae"

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        super().__init__(model, checkpoint)
        channels = checkpoint.vae["latent_channels"]
        self.inputs = (TensorSpec("latents", "float32", ("batch", channels, "latent_height", "latent_width")),)
        self.outputs = (TensorSpec("image", "float32", ("batch", 3, "height", "width")),)

    @property
    def used(self) -> nn.Module:
        return self.model.decoder

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        latents = latents / self.checkpoint.scale + self.checkpoint.shift
        return self.model.decode(latents.to(self.dtype), return_dict=False)[0].float()


class VAEEncoder(Graph):
    """Picture in [-1, 1] → mean and std of its latents as the UNet knows them: latents = mean + std · noise."""

    source = "vae"

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        super().__init__(model, checkpoint)
        shape = ("batch", checkpoint.vae["latent_channels"], "latent_height", "latent_width")
        self.inputs = (TensorSpec("image", "float32", ("batch", 3, "height", "width")),)
        self.outputs = (TensorSpec("mean", "float32", shape), TensorSpec("std", "float32", shape))

    @property
    def used(self) -> nn.Module:
        return self.model.encoder

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latent = self.model.encode(image.to(self.dtype), return_dict=False)[0]
        mean, std = latent.mean.float(), latent.std.float()
        return (mean - self.checkpoint.shift) * self.checkpoint.scale, std * self.checkpoint.scale


TEXT_GRAPHS: Mapping[tuple[str, bool], type[Graph]] = {
    ("text_encoder", False): TextEncoder, ("text_encoder", True): FirstXLTextEncoder,
    ("text_encoder_2", True): SecondXLTextEncoder}
"""By name, and whether it is one of Stable Diffusion XL."""


def graphs(checkpoint: Checkpoint) -> dict[str, type[Graph]]:
    """The components of a checkpoint's bundle → how each is traced."""
    texts = {text.name: TEXT_GRAPHS[text.name, checkpoint.time_ids > 0] for text in checkpoint.texts}
    return {**texts, "unet": UNet, "vae_decoder": VAEDecoder, "vae_encoder": VAEEncoder}
