"""Prompts to what the UNet is told of them, with one text encoder or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from engines import Bundle
from runtime.buffers import BoundEngine
from runtime.text import PromptTokenizer

ROWS = 2
"""Of a text encoder's engine: a prompt and its negative."""


class TextEncoders:
    """The text encoders of a bundle. engine: the bound engine of a component and rows."""

    def __init__(self, bundle: Bundle, engine: Callable[[str, int], BoundEngine]) -> None:
        self._engine = engine
        self._zero_negative = bundle.manifest.zero_negative
        self._texts = [(spec, PromptTokenizer(bundle.path, spec)) for spec in bundle.manifest.text]

    def load(self) -> None:
        for spec, _ in self._texts:
            self._engine(spec.component, ROWS)

    def __call__(self, prompts: Sequence[str | None]) -> dict[str, np.ndarray]:
        """By input of the UNet, float32 [n, …]: encoder_hidden_states [n, tokens, width], the states of all encoders
        side by side, and the pooled text where it takes that. Distinct prompts are encoded once.

        None is no prompt at all: the empty one, or zeros where the model was trained with those.
        """
        distinct = list(dict.fromkeys(prompt or "" for prompt in prompts))
        hidden, found = [], {}
        for spec, tokenize in self._texts:
            ids = np.stack([tokenize(prompt) for prompt in distinct])
            outputs = self._run(spec.component, ids)
            hidden.append(outputs["hidden_states"])
            if spec.pooled:
                found[spec.pooled] = outputs[spec.pooled]
        found["encoder_hidden_states"] = np.concatenate(hidden, axis=2)
        rows = {prompt: row for row, prompt in enumerate(distinct)}
        texts = {name: values[[rows[prompt or ""] for prompt in prompts]] for name, values in found.items()}
        if self._zero_negative:
            for values in texts.values():
                values[[prompt is None for prompt in prompts]] = 0
        return texts

    def _run(self, component: str, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Every output for int64 [n, tokens], a few rows at a time; the last ones are repeated to fill the engine."""
        encoder, parts = self._engine(component, ROWS), []
        for start in range(0, len(ids), ROWS):
            chunk = ids[start:start + ROWS]
            outputs = encoder(input_ids=np.resize(chunk, (ROWS, ids.shape[1])))
            parts.append({name: values[:len(chunk)].copy() for name, values in outputs.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
