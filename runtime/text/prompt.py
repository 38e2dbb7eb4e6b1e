"""Weighted prompts have `(word:1.3)`, `[word]` and `BREAK`; their weights change the output of a text encoder.

Syntax and rule are those of the Stable Diffusion web UI (github.com/AUTOMATIC1111/stable-diffusion-webui,
modules/prompt_parser.py, sd_emphasis.py and sd_hijack_clip.py), which most weighted prompts are written for.
docs/prompts.md says what differs elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MORE, LESS = 1.1, 1 / 1.1
"""Weights of one pair of round and of square brackets."""
ROUNDING = 1e-3
"""Share of the RMS of a text encoder's output below which its mean is rounding, and is not restored."""
NEARBY = 20
"""Tokens: a comma this close to the end of a full chunk ends it, and what follows the comma goes to the next."""

_TOKEN = re.compile(r"""
    \\(?P<escaped>[()\[\]\\])
  | :\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)
  | (?P<bracket>[()\[\]])
  | [^\\()\[\]:]+ | : | \\
""", re.VERBOSE)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_EDITING = re.compile(r"(?<!\\)\[[^\[\]\\]*(?:\|[^\[\]\\]*|:\s*\d*\.?\d+\s*)\]")
_AND = re.compile(r"\bAND\b")


class Run(NamedTuple):
    """Text of one weight."""

    text: str
    weight: float


def parse(prompt: str) -> list[list[Run]]:
    r"""Return the sections of a prompt between its BREAKs, at least one, each as runs of text and weight.

    `(a)` weighs 1.1 and `[a]` 1/1.1; `(a:1.3)` weighs 1.3; nested weights are multiplied. A bracket that is not closed
    holds until the end, one that was not opened is text, and so is what follows a backslash: `\(`, `\)`, `\[`, `\]`,
    `\\`. A BREAK inside brackets is one too (the web UI takes that for text). Raises ValueError for what the web UI has
    besides: prompt editing `[a:b:0.5]`, alternation `[a|b]`, and `AND`.
    """
    if match := _EDITING.search(prompt) or _AND.search(prompt):
        raise ValueError(f"prompt: got {match[0]!r}, expected words, (words), [words] and (words:1.3); the web UI's "
                         "prompt editing, alternation and AND are not supported: write \\[ and \\] for brackets of the "
                         "text, and 'and' for the word")
    runs: list[tuple[str | None, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(first: int, weight: float) -> None:
        runs[first:] = [(text, inner * weight) for text, inner in runs[first:]]

    for token in _TOKEN.finditer(prompt):
        escaped, weight, bracket = token["escaped"], token["weight"], token["bracket"]
        if escaped:
            runs.append((escaped, 1.0))
        elif bracket in ("(", "["):
            opened[bracket].append(len(runs))
        elif weight and opened["("]:
            weigh(opened["("].pop(), float(weight))
        elif bracket == ")" and opened["("]:
            weigh(opened["("].pop(), MORE)
        elif bracket == "]" and opened["["]:
            weigh(opened["["].pop(), LESS)
        else:
            first, *others = _BREAK.split(token[0])
            runs += [(first, 1.0), *((part, 1.0) for other in others for part in (None, other))]
    for bracket, weight in (("(", MORE), ("[", LESS)):
        for first in opened[bracket]:
            weigh(first, weight)
    return _sections(runs)


def _sections(runs: Sequence[tuple[str | None, float]]) -> list[list[Run]]:
    """Cut runs at each None, and join those of equal weight that touch: they are tokenized as one text."""
    sections: list[list[Run]] = [[]]
    for text, weight in runs:
        last = sections[-1]
        if text is None:
            sections.append([])
        elif last and last[-1].weight == weight:
            last[-1] = Run(last[-1].text + text, weight)
        elif text:
            last.append(Run(text, weight))
    return sections


def fill(units: Sequence[tuple[tuple[int, ...], float]], room: int, comma: int | None) -> list[list[tuple[int, float]]]:
    """Cut token ids and weights into chunks of at most `room`, at least one; a unit of several ids is never cut.

    comma: the id of a comma that ends a word, where a chunk ends rather than at its last token (NEARBY).
    """
    chunks: list[list[tuple[int, float]]] = [[]]
    after = 0  # position after the last comma of this chunk; 0 where there is none
    for ids, weight in units:
        chunk = chunks[-1]
        if ids == (comma,):
            after = len(chunk) + 1
        elif len(chunk) == room and after and room - after < NEARBY:
            chunks[-1:] = [chunk[:after], chunk[after:]]
            after = 0
        if len(chunks[-1]) + len(ids) > room:
            chunks.append([])
            after = 0
        chunks[-1] += [(i, weight) for i in ids]
    return chunks


def emphasize(states: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the hidden states of one chunk, float32 [tokens, width], times the weights, float32 [tokens].

    All are then scaled so that the mean over the whole chunk is what it was: the rule "Original" of the web UI
    (sd_emphasis.py). A mean that is nothing but rounding, before or after, is left as it is (ROUNDING).
    """
    weighted = states * weights[:, None]
    before, after = states.mean(dtype=np.float64), weighted.mean(dtype=np.float64)
    if min(abs(before), abs(after)) < ROUNDING * np.sqrt(np.mean(states**2, dtype=np.float64)):
        return weighted
    return weighted * np.float32(before / after)
