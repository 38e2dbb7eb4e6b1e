"""Prompts to token ids, with the checkpoint's own tokenizer."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from engines import EngineError
from engines.bundle import TextSpec
from runtime.text.prompt import fill, parse

logger = logging.getLogger(__name__)

Words = tuple[tuple[str, int], ...]
"""Words of textual inversion and how many vectors each stands for. Id −1 − i is vector i of all of them in order."""

COMMA = ",</w>"
"""Token of a comma that ends a word."""


class PromptTokenizer:
    """The tokenizer of one text encoder: fixed length, end token kept when a prompt is cut, padded as in training."""

    def __init__(self, directory: Path, spec: TextSpec) -> None:
        self._file = directory / spec.tokenizer
        self._tokenizer = self._read()
        self._start, self._end = self._tokenizer.encode("").ids
        self._length = spec.max_length
        self._pad = spec.pad_id
        self._knowing = functools.lru_cache(maxsize=8)(self._extended)

    @property
    def room(self) -> int:
        """Return how many tokens of a prompt fit beside start and end."""
        return self._length - 2

    def __call__(self, prompt: str, words: Words = ()) -> np.ndarray:
        """Return int64 [max_length]: start token, words, end token, padding. Text beyond that is logged and dropped.

        Raises ValueError where one of `words` is a token already.
        """
        tokens = [(i, start) for ids, start in self._units(prompt, words) for i in ids]
        if len(tokens) > self.room:
            logger.warning("prompt has %d tokens, the text encoder takes %d; prompt_style 'weighted' takes more in "
                           "chunks; dropped: %r", len(tokens) + 2, self._length, prompt[tokens[self.room][1]:])
        return self._row([i for i, _ in tokens[:self.room]])

    def chunks(self, prompt: str, words: Words = ()) -> tuple[np.ndarray, np.ndarray]:
        """Return ids int64 and weights float32, both [n, max_length], of a weighted prompt, in n ≥ 1 chunks.

        Each chunk has a start and an end token and is padded, all of weight 1. Raises ValueError as `parse` does, and
        where one of `words` is a token already.
        """
        comma, sections = self._tokenizer.token_to_id(COMMA), parse(prompt)
        chunks: list[list[tuple[int, float]]] = []
        for section in sections:
            units = [(ids, run.weight) for run in section for ids, _ in self._units(run.text, words)]
            if units or section is not sections[-1] or not chunks:
                chunks += fill(units, self.room, comma)
        weights = np.ones((len(chunks), self._length), np.float32)
        for row, chunk in zip(weights, chunks, strict=True):
            row[1:1 + len(chunk)] = [weight for _, weight in chunk]
        return np.stack([self._row([i for i, _ in chunk]) for chunk in chunks]), weights

    def _row(self, ids: Sequence[int]) -> np.ndarray:
        return np.array([self._start, *ids, self._end] + [self._pad] * (self.room - len(ids)), np.int64)

    def _units(self, text: str, words: Words) -> list[tuple[tuple[int, ...], int]]:
        """Return each token, or each of `words` with all its vectors, and where it begins in the text."""
        tokenizer = self._knowing(tuple(name for name, _ in words)) if words else self._tokenizer
        vectors, first = {}, 0
        for name, count in words:
            vectors[tokenizer.token_to_id(name)] = tuple(-1 - i for i in range(first, first + count))
            first += count
        encoding = tokenizer.encode(text, add_special_tokens=False)
        return [(vectors.get(i, (i,)), start) for i, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)]

    def _read(self) -> Tokenizer:
        try:
            tokenizer = Tokenizer.from_file(str(self._file))
        except Exception as e:  # tokenizers raises bare Exception for every damaged file
            raise EngineError(f"{self._file}: not a tokenizer ({e}); export the checkpoint again") from e
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def _extended(self, names: tuple[str, ...]) -> Tokenizer:
        """Return a tokenizer that takes each of `names` for a token, anywhere and in any case, as diffusers has it."""
        tokenizer = self._read()
        for name in names:
            if tokenizer.token_to_id(name) is not None:
                raise ValueError(f"embeddings: got the name {name!r}, which is a token of the model already; give it "
                                 f"another, such as '<{name}>=FILE'")
        tokenizer.add_tokens(list(names))
        return tokenizer
