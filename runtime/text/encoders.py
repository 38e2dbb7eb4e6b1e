"""The text of requests: every prompt through every text encoder, in chunks, weighted, with textual inversion."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engines.bundle import Bundle
from runtime.devices.bound import BoundEngine
from runtime.networks.denoiser import Inputs
from runtime.request.request import Request
from runtime.text.embeddings import Embedding, load_all
from runtime.text.prompt import emphasize
from runtime.text.tokenizer import PromptTokenizer

logger = logging.getLogger(__name__)

ROWS = 2
"""Of a text encoder's engine."""


@dataclass(frozen=True)
class Text:
    """What the UNet is given for one request, negative prompt first.

    states: float32 [2, tokens, width], those of several encoders joined along their width. pooled: float32 [2, width],
    None where the UNet takes none.
    """

    states: np.ndarray
    pooled: np.ndarray | None

    @property
    def inputs(self) -> Inputs:
        """Both, by input of the UNet."""
        pooled = {} if self.pooled is None else {"text_embeds": self.pooled}
        return {"encoder_hidden_states": self.states, **pooled}

    @property
    def tokens(self) -> int:
        """Length of the UNet's text: 77 for each chunk. Requests of different lengths run on different engines."""
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
    """The text encoders of a bundle. engine: the bound engine of a component and rows."""

    def __init__(self, bundle: Bundle, engine: Callable[[str, int], BoundEngine]) -> None:
        self._engine = engine
        self._path = bundle.path
        self._specs = bundle.manifest.text
        self._tokenizers = [PromptTokenizer(bundle.path, spec) for spec in self._specs]
        inputs = [{one.name: one for one in bundle.component(spec.component).inputs} for spec in self._specs]
        self._widths = {spec.component: int(own["embeddings"].shape[-1]) if "embeddings" in own else 0
                        for spec, own in zip(self._specs, inputs, strict=True)}
        self._zero_negative = bundle.manifest.guidance.negative == "zeros"

    def load(self) -> None:
        """Load every engine."""
        for spec in self._specs:
            self._engine(spec.component, ROWS)

    def __call__(self, requests: Sequence[Request]) -> list[Text]:
        """The text of each request; equal chunks of all of them are encoded once.

        A negative prompt of None is the empty one, or zeros where the model was trained with those. Raises ValueError
        for an embedding or a prompt that cannot be, before anything is computed.
        """
        prompts = [self._tokenize(request) for request in requests]
        encoded = [self._encode(i, [own[i] for own in prompts]) for i in range(len(self._specs))]
        texts = []
        for request, parts in zip(requests, zip(*encoded, strict=True), strict=True):
            states, pooled = zip(*parts, strict=True)
            text = Text(np.concatenate(states, axis=-1), next((p for p in pooled if p is not None), None))
            if self._zero_negative and request.negative_prompt is None:
                for values in text.inputs.values():
                    values[0] = 0
            texts.append(text)
        return texts

    def _tokenize(self, request: Request) -> list[_Prompts]:
        """For each encoder; prompts of fewer chunks than the other are padded with those of an empty prompt.

        Without guidance the negative prompt is empty, so that its length changes nothing.
        """
        embeddings = self._embeddings(request)
        words = tuple((one.name, one.count) for one in embeddings)
        weighted = request.prompt_style == "weighted"
        found = []
        for tokenize in self._tokenizers:
            for prompt in ((request.negative_prompt or "") if request.guided else "", request.prompt):
                if weighted:
                    found.append(tokenize.chunks(prompt, words))
                else:
                    ids = tokenize(prompt, words)[None]
                    found.append((ids, np.ones(ids.shape, np.float32)))
        self._report(embeddings, [ids for ids, _ in found])
        count = max(len(ids) for ids, _ in found)
        prompts = []
        for i, tokenize in enumerate(self._tokenizers):
            ids, weights = zip(*(_padded(*one, tokenize(""), count) for one in found[2 * i:2 * i + 2]), strict=True)
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

    def _encode(self, i: int, prompts: Sequence[_Prompts]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """States [2, chunks · length, width] of encoder `i` for each of `prompts`, and the pooled output, [2, width].

        The latter is the first chunk's, without weights, as in the web UI.
        """
        rows = {_key(ids, own.vectors): (ids, own.vectors) for own in prompts for prompt in own.ids for ids in prompt}
        outputs, pooled = self._run(i, rows), self._specs[i].pooled
        found = []
        for own in prompts:
            chunks = [[outputs[_key(ids, own.vectors)] for ids in prompt] for prompt in own.ids]
            states = [np.concatenate([_weighted(chunk["hidden_states"], w) for chunk, w in zip(*pair, strict=True)])
                      for pair in zip(chunks, own.weights, strict=True)]
            found.append((np.stack(states), np.stack([first[pooled] for first, *_ in chunks]) if pooled else None))
        return found

    def _run(self, i: int, rows: Mapping[bytes, tuple[np.ndarray, np.ndarray]]) -> dict[bytes, dict[str, np.ndarray]]:
        """Outputs of encoder `i`, without the batch, for each of `rows`: ids and the vectors they refer to."""
        engine, keys = self._engine(self._specs[i].component, ROWS), list(rows)
        outputs: dict[bytes, dict[str, np.ndarray]] = {}
        for start in range(0, len(keys), ROWS):
            batch = (keys[start:start + ROWS] * ROWS)[:ROWS]  # the last of an odd number takes both rows
            given = [_inputs(*rows[key]) for key in batch]
            feed = {name: np.stack([one[name] for one in given]) for name in given[0] if name in engine.engine.inputs}
            found = engine(**feed)
            outputs |= {key: {name: value[row] for name, value in found.items()} for row, key in enumerate(batch)}
        return outputs


def _padded(ids: np.ndarray, weights: np.ndarray, empty: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Chunks [n, length] with those of an empty prompt after them, `count` together."""
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
