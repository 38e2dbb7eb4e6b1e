"""Prompts to token ids, with the checkpoint's own tokenizer."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from engines import EngineError
from engines.bundle import TextSpec

logger = logging.getLogger(__name__)


class PromptTokenizer:
    """The tokenizer of one text encoder: fixed length, end token kept when a prompt is cut, padded as in training."""

    def __init__(self, directory: Path, spec: TextSpec) -> None:
        file = directory / spec.tokenizer
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as e:  # tokenizers raises bare Exception for every damaged file
            raise EngineError(f"{file}: not a tokenizer ({e}); export the checkpoint again") from e
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._length = spec.max_length
        self._pad = spec.pad_id

    def __call__(self, prompt: str) -> np.ndarray:
        """int64 [max_length]: start token, words, end token, padding. Text beyond the length is logged and dropped."""
        encoding = self._tokenizer.encode(prompt)
        ids = encoding.ids
        if len(ids) > self._length:
            cut = encoding.offsets[self._length - 1][0]
            logger.warning("prompt has %d tokens, the text encoder takes %d; dropped: %r",
                           len(ids), self._length, prompt[cut:])
            ids = [*ids[:self._length - 1], ids[-1]]
        return np.array(ids + [self._pad] * (self._length - len(ids)), np.int64)
