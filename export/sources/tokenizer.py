"""CLIP's tokenizer: read from a checkpoint, or made from the vocabulary that ships, and saved as one tokenizer.json."""

from __future__ import annotations

import gzip
from pathlib import Path

from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from export.errors import ExportError

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MERGES = Path(__file__).parent / "configs" / "clip_bpe.txt.gz"

_PROBES = ("a photograph of an astronaut riding a horse", "", "It's 2 o'clock!!  Façade, 日本 ☃", f"x {EOS} y")


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Read a folder with tokenizer.json, or vocab.json and merges.txt. Raises ExportError."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ExportError(f"{folder}: no tokenizer, expected tokenizer.json or vocab.json and merges.txt; "
                          "pass one with --tokenizer DIR")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # the tokenizers library raises bare Exception
        raise ExportError(f"{folder}: the tokenizer could not be read: {e}") from e


def clip_tokenizer(pad: str = EOS) -> CLIPTokenizer:
    """Make OpenAI CLIP's tokenizer of 49408 tokens, that of Stable Diffusion 1.x (pad EOS) and 2.x (pad "!").

    The vocabulary, in this order: the 256 bytes (printable ones first), the same ending a word, the merges, start, end.
    """
    with gzip.open(MERGES, "rt", encoding="utf8") as file:
        merges = [(a, b) for a, b in (line.split() for line in file)]
    alphabet = [chr(c) for a, b in ("!~", "¡¬", "®ÿ") for c in range(ord(a), ord(b) + 1)]
    alphabet += [chr(256 + n) for n in range(256 - len(alphabet))]
    words = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges), BOS, EOS]
    return CLIPTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=merges, pad_token=pad,
                         model_max_length=77)


def save_tokenizer(tokenizer: CLIPTokenizer, path: Path) -> None:
    """Write the `tokenizers` library's file; it adds start and end, and neither pads nor cuts.

    Raises ExportError if reading it back gives other ids.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    path.parent.mkdir()
    backend.save(str(path))
    saved = Tokenizer.from_file(str(path))
    for text in _PROBES:
        if (got := saved.encode(text).ids) != (expected := tokenizer(text, verbose=False).input_ids):
            raise ExportError(f"the saved tokenizer gives {got} for {text!r}, expected {expected}")
