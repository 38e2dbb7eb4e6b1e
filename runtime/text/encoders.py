"""Prompts pass the text encoders in chunks, weighted, with textual inversions."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engines.bundle import Component
from runtime.lora.application import Stack
from runtime.networks.denoiser import Inputs
from runtime.networks.shelf import Shelf
from runtime.request.request import Request
from runtime.text.embeddings import Embedding, load_all
from runtime.text.prompt import emphasize
from runtime.text.tokenizer import PromptTokenizer

logger = logging.getLogger(__name__)

ROWS = 2
"""Batch rows of a text-encoder engine."""


@dataclass(frozen=True)
class Text:
    """The text that the denoiser is given for one request, negative prompt first.

    states: float32 [2, tokens, width], those of several encoders joined along their width. pooled: float32 [2, width],
    None where the denoiser takes none. inputs: both by input of the denoiser.
    """

    states: np.ndarray
    pooled: np.ndarray | None
    inputs: Inputs

    @property
    def tokens(self) -> int:
        """Return the length of the text: 77 for each chunk. Requests of different lengths run on different engines."""
        return self.states.shape[1]


@dataclass(frozen=True)
class _Prompts:
    """Both prompts of a request for one encoder: ids int64 [2, chunks, length], weights float32 of the same shape.

    vectors: float32 [n, width]; id −1 − i stands for vector i.
    """

    ids: np.ndarray
    weights: np.ndarray
    vectors: np.ndarray


class TextEncoders:
    """The text encoders of a bundle, on its shelf of engines."""

    def __init__(self, shelf: Shelf) -> None:
        bundle = shelf.bundle
        self._shelf = shelf
        self._path = bundle.path
        self._specs = bundle.manifest.text
        self._tokenizers = [PromptTokenizer(bundle.path, spec) for spec in self._specs]
        self._widths = {spec.component: _width(bundle.component(spec.component)) for spec in self._specs}
        self._conditions = [c for c in bundle.manifest.conditions if c.source == "text_encoder"]
        self._zero_negative = bundle.manifest.guidance.negative == "zeros"

    def load(self) -> None:
        """Load every engine."""
        for spec in self._specs:
            self._shelf.engine(spec.component, ROWS)

    def __call__(self, requests: Sequence[Request], stack: Stack = ()) -> list[Text]:
        """Return the text of each request; equal chunks of all of them are encoded once, with the LoRAs of `stack`.

        A negative prompt of None is the empty one, or zeros where the model was trained with those. Raises ValueError
        for an embedding or a prompt that cannot be, before anything is computed.
        """
        prompts = [self._tokenize(request) for request in requests]
        encoded = [self._encode(i, [of_request[i] for of_request in prompts], stack) for i in range(len(self._specs))]
        texts = []
        for request, parts in zip(requests, zip(*encoded, strict=True), strict=True):
            of_encoders = zip(*parts, strict=True)
            states = np.concatenate(next(of_encoders), axis=-1)
            pooled = next((values for values in next(of_encoders) if values is not None), None)
            told = {"text": states} if pooled is None else {"text": states, "pooled_text": pooled}
            if self._zero_negative and request.negative_prompt is None:
                for values in told.values():
                    values[0] = 0
            inputs = {condition.input: told[condition.meaning] for condition in self._conditions
                      if condition.meaning in told}
            texts.append(Text(states, pooled, inputs))
        return texts

    def _tokenize(self, request: Request) -> list[_Prompts]:
        """Return the prompts for each encoder; the one of fewer chunks is padded with those of an empty prompt.

        Without guidance the negative prompt is empty, so that its length changes nothing.
        """
        embeddings = self._embeddings(request)
        words = tuple((embedding.name, embedding.count) for embedding in embeddings)
        weighted = request.prompt_style == "weighted"
        chunks = []  # of the first encoder, negative prompt first, then of the second
        for tokenize in self._tokenizers:
            for prompt in ((request.negative_prompt or "") if request.guided else "", request.prompt):
                if weighted:
                    chunks.append(tokenize.chunks(prompt, words))
                else:
                    ids = tokenize(prompt, words)[None]
                    chunks.append((ids, np.ones(ids.shape, np.float32)))
        self._report(embeddings, [ids for ids, _ in chunks])
        count = max(len(ids) for ids, _ in chunks)
        prompts = []
        for i, tokenize in enumerate(self._tokenizers):
            ids, weights = zip(*(_padded(*pair, tokenize(""), count) for pair in chunks[2 * i:2 * i + 2]), strict=True)
            none = np.zeros((0, self._widths[self._specs[i].component]), np.float32)
            vectors = np.concatenate([none, *(embedding.vectors[i] for embedding in embeddings)])
            prompts.append(_Prompts(np.stack(ids), np.stack(weights), vectors))
        return prompts

    def _embeddings(self, request: Request) -> tuple[Embedding, ...]:
        if request.embeddings and not all(self._widths.values()):
            raise ValueError(f"embeddings: got some for {self._path}, whose text encoder takes none: an older version "
                             f"exported it; export it again: python -m export CHECKPOINT -o {self._path} --force")
        return load_all(request.embeddings, self._widths, min(t.room for t in self._tokenizers))

    def _report(self, embeddings: Sequence[Embedding], ids: Sequence[np.ndarray]) -> None:
        """Warn of an embedding that no prompt names."""
        used, first = {int(i) for array in ids for i in array.reshape(-1)}, 0
        for embedding in embeddings:
            if -1 - first not in used:
                logger.warning("embedding %r is in no prompt that is used; write its name where it belongs",
                               embedding.name)
            first += embedding.count

    def _encode(self, i: int, prompts: Sequence[_Prompts], stack: Stack) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Return what encoder `i` gives for each prompt: states [2, chunks · length, width], and pooled [2, width].

        The latter is the first chunk's, without weights, as in the web UI.
        """
        rows = {_key(ids, both.vectors): (ids, both.vectors)
                for both in prompts for prompt in both.ids for ids in prompt}
        outputs, pooled = self._run(i, rows, stack), self._specs[i].pooled
        encoded = []
        for both in prompts:
            chunks = [[outputs[_key(ids, both.vectors)] for ids in prompt] for prompt in both.ids]
            states = [np.concatenate([_weighted(chunk["hidden_states"], w) for chunk, w in zip(*pair, strict=True)])
                      for pair in zip(chunks, both.weights, strict=True)]
            encoded.append((np.stack(states), np.stack([first[pooled] for first, *_ in chunks]) if pooled else None))
        return encoded

    def _run(self, i: int, rows: Mapping[bytes, tuple[np.ndarray, np.ndarray]],
             stack: Stack) -> dict[bytes, dict[str, np.ndarray]]:
        """Return the outputs of encoder `i`, without the batch, for each of `rows`: ids, and vectors they refer to."""
        engine, keys = self._shelf.engine(self._specs[i].component, ROWS, stack=stack), list(rows)
        outputs: dict[bytes, dict[str, np.ndarray]] = {}
        for start in range(0, len(keys), ROWS):
            batch = (keys[start:start + ROWS] * ROWS)[:ROWS]  # the last of an odd number takes both rows
            inputs = [_inputs(*rows[key]) for key in batch]
            feed = {name: np.stack([row[name] for row in inputs]) for name in inputs[0] if name in engine.engine.inputs}
            result = engine(**feed)
            outputs |= {key: {name: value[row] for name, value in result.items()} for row, key in enumerate(batch)}
        return outputs


def _width(component: Component) -> int:
    """Return the numbers of a vector that a text encoder takes for a word, 0 where it takes none."""
    return next((int(tensor.shape[-1]) for tensor in component.inputs if tensor.name == "embeddings"), 0)


def _padded(ids: np.ndarray, weights: np.ndarray, empty: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return chunks [n, length] with those of an empty prompt after them, `count` together."""
    more = count - len(ids)
    return (np.concatenate([ids, np.tile(empty, (more, 1))]),
            np.concatenate([weights, np.ones((more, len(empty)), np.float32)]))


def _key(ids: np.ndarray, vectors: np.ndarray) -> bytes:
    return ids.tobytes() + (vectors.tobytes() if (ids < 0).any() else b"")


def _inputs(ids: np.ndarray, vectors: np.ndarray) -> dict[str, np.ndarray]:
    placed = ids < 0
    embeddings = np.zeros((len(ids), vectors.shape[1]), np.float32)
    embeddings[placed] = vectors[-1 - ids[placed]]
    return {"input_ids": np.where(placed, 0, ids), "embeddings": embeddings, "placed": placed.astype(np.float32)}


def _weighted(states: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return emphasize(states, weights) if (weights != 1).any() else states
