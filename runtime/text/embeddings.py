"""Textual inversion (Gal et al., arXiv 2208.01618): learned vectors that stand for a word of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, deserialize

from kernels.cpu.bfloat16 import widened

LARGEST = 1 << 26
"""Bytes of the largest file that is read: an embedding has kilobytes, and a checkpoint is not read by mistake."""

_NAMELESS = ("emb_params", "*")
_ENCODERS = {"text_encoder": ("clip_l", "text_encoders_0"), "text_encoder_2": ("clip_g", "text_encoders_1")}
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@dataclass(frozen=True)
class Embedding:
    """A textual inversion that was read.

    name: the word that stands for it. vectors: for each text encoder of the model, float32 [n, width].
    """

    name: str
    vectors: tuple[np.ndarray, ...]

    @property
    def count(self) -> int:
        """Return how many vectors a text encoder takes for the word."""
        return len(self.vectors[0])


def load(source: str | Path, widths: Mapping[str, int]) -> Embedding:
    """Read "FILE" or "NAME=FILE", a .safetensors file, for text encoders of these widths, by component.

    For "text_encoder" alone: a file of one tensor [width] or [n, width], whose name is the word unless one is given;
    that of the file where the tensor's says nothing ("emb_params"). With "text_encoder_2", as Stable Diffusion XL has
    it: tensors clip_l and clip_g (or text_encoders_0 and text_encoders_1), of which its refiner takes the latter alone.
    Raises ValueError for any other file, and where there is none.
    """
    name, equals, file = str(source).partition("=")
    if not equals or Path(source).is_file():
        name, file = "", str(source)
    path = Path(file)
    tensors = _read(path)
    if "text_encoder_2" in widths:
        keys = [key for component in widths for key in _ENCODERS[component] if key in tensors]
        others = set(tensors) - {key for names in _ENCODERS.values() for key in names}
        word, expected = path.stem, "clip_l and clip_g, for the two text encoders of the model"
    else:
        keys, others = list(tensors), set[str]()
        word, expected = path.stem if keys[0] in _NAMELESS else keys[0], "one tensor"
    if len(keys) != len(widths) or others:
        raise ValueError(f"{path}: got {len(tensors)} tensors ({', '.join(list(tensors)[:4])}), expected {expected}; "
                         "it was trained for another kind of model, or is no textual inversion")
    vectors = tuple(np.atleast_2d(tensors[key]) for key in keys)
    for key, array, width in zip(keys, vectors, widths.values(), strict=True):
        if array.ndim != 2 or array.shape[1] != width or len(array) != len(vectors[0]):
            raise ValueError(f"{path}: got {key} of shape {array.shape}, expected [{len(vectors[0])}, {width}]; it was "
                             "trained for another model")
    return Embedding(name or word, vectors)


def load_all(sources: Sequence[str | Path], widths: Mapping[str, int], room: int) -> tuple[Embedding, ...]:
    """Load each of `sources`.

    Raises ValueError as `load` does, where two have one name, or where one has more vectors than a prompt has tokens.
    """
    embeddings = tuple(load(source, widths) for source in sources)
    names = [embedding.name.lower() for embedding in embeddings]
    for embedding in embeddings:
        if names.count(embedding.name.lower()) > 1:
            raise ValueError(f"embeddings: got two named {embedding.name!r}, expected different names; "
                             "give one of them another: NAME=FILE")
        if embedding.count > room:
            raise ValueError(f"embeddings: got {embedding.count} vectors in {embedding.name!r}, expected at most "
                             f"{room}, the tokens of a prompt")
    return embeddings


def _read(path: Path) -> Mapping[str, np.ndarray]:
    """Return the tensors of a safetensors file in float32, by name, at least one."""
    if not path.is_file():
        raise ValueError(f"embeddings: got {str(path)!r}, which is no file, expected FILE or NAME=FILE")
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path}: got a file that ends in {path.suffix!r}, expected .safetensors; convert it with: "
                         f"python -m export.embedding {path} -o {path.with_suffix('.safetensors')}")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path}: got {path.stat().st_size >> 20} MiB, expected an embedding of some kilobytes")
    try:
        tensors = {name: _float32(**tensor) for name, tensor in deserialize(path.read_bytes())}
    except (SafetensorError, KeyError, ValueError) as e:
        raise ValueError(f"{path}: not a safetensors file of floating-point tensors ({e!r}); copy it again") from e
    if not tensors:
        raise ValueError(f"{path}: got no tensor, expected a textual inversion")
    return tensors


def _float32(dtype: str, shape: Sequence[int], data: bytes) -> np.ndarray:
    return widened(np.array(np.frombuffer(data, _DTYPES[dtype]))).reshape(shape)
