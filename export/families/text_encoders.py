"""CLIP's text encoders as graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers.models.clip.modeling_clip import CLIPEncoder

from engines.spec import TensorSpec
from export.trace.traced_module import TracedModule


class TextEncoder(TracedModule):
    """Token ids → the hidden states that the UNet attends to (the last layer, after the final norm).

    Where `placed` is above 0 the vector of the token is that of `embeddings` (textual inversion, arXiv 2208.01618).
    """

    source = "text_encoder"
    role = "text_encoder"
    rows = 2  # the negative prompt and the prompt

    def __init__(self, model: nn.Module, length: int) -> None:
        """Wrap a text encoder. length: tokens of a prompt."""
        super().__init__(model)
        width = model.config.hidden_size
        self.below = {"input_ids": model.config.vocab_size}
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

    def __init__(self, model: nn.Module, length: int) -> None:
        super().__init__(model, length)
        self.outputs += (TensorSpec("text_embeds", "float32", ("batch", model.config.projection_dim)),)

    def forward(self, input_ids: torch.Tensor, embeddings: torch.Tensor,
                placed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with self._placing(embeddings, placed):
            encoded = self.model(input_ids, output_hidden_states=True)
        return encoded.hidden_states[-2].float(), encoded.text_embeds.float()
