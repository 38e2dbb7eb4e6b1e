"""LoRA files: tensors of a .safetensors file, in any of the dialects met in the wild, as pairs for a model's weights.

A pair changes a weight W by factor · up · down (arXiv 2106.09685, there (α / r) · B · A), where factor is α / r, or
α / √r where the file says so (arXiv 2312.03732), and 1 without an α. A convolution is written as a matrix of one row
for each output channel: `down` is a convolution of the same size to r channels, `up` one of 1x1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engines import Bundle
from engines.onnx.initializers import initializers
from kernels.cpu.bfloat16 import widened
from runtime.lora.names import original_names

METADATA = "__metadata__"
ADAPTER = "lora_adapter_metadata"
"""Entry of a file's metadata where diffusers keeps the configuration of PEFT, as JSON."""

_DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "u2"}
_PREFIXES = (("lora_unet_", "unet"), ("unet.", "unet"), ("diffusion_model.", "unet"), ("lora_te1_", "text_encoder"),
             ("lora_te2_", "text_encoder_2"), ("lora_te_", "text_encoder"), ("text_encoder_2.", "text_encoder_2"),
             ("text_encoder.", "text_encoder"))
_WEIGHT = re.compile(r"(.+?)(?:\.lora_(?:linear_layer\.)?|\.lora\.|_lora\.)(down|up|A|B)(?:\.[^.]+)?\.weight")
_ALPHA = re.compile(r"(.+?)(?:[._]lora)?\.alpha")
_ROLES = {"down": "down", "A": "down", "up": "up", "B": "up"}
_OTHERS = {
    "LoHa": r".*hada_.*", "LoKr": r".*lokr_.*", "DoRA": r".*(dora_scale|lora_magnitude_vector).*",
    "a decomposed convolution": r".*lora_mid.*", "OFT": r".*oft_.*", "IA3": r".*(on_input|ia3_l).*",
    "GLoRA": r".*\.[ab][12]\.weight", "a LoRA of biases": r".*\.(lora_B|lora_up)\..*bias",
    "a LoRA of embeddings": r".*lora_embedding_.*", "whole differences": r".*(\.diff|\.diff_b|\.[wb]_norm)",
    "Control-LoRA": r"lora_controlnet"}
"""Kinds of adapter that are no LoRA, or more than one → the keys that show it."""

_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out_0": "out_proj"}
"""Names in an encoder's attention that old files have → the encoder's own."""


@dataclass(frozen=True, eq=False)
class Pair:
    """down: float32 [r, n]. up: float32 [m, r]. For a weight whose first axis is m, and whose others together are n."""

    down: np.ndarray
    up: np.ndarray
    factor: float


@dataclass(frozen=True, eq=False)
class LoraFile:
    """pairs: model ("unet", "text_encoder", "text_encoder_2") → weight → its pair. unmatched: keys without a weight."""

    pairs: Mapping[str, Mapping[str, Pair]]
    unmatched: tuple[str, ...]


@dataclass(frozen=True)
class Weights:
    """Weights of one model that a LoRA may change: shapes by name, and the name that each of its spellings means.

    Spellings have "_" between all parts. unused: beginnings of such for layers that the graph leaves out.
    """

    shapes: Mapping[str, tuple[int, ...]]
    spellings: Mapping[str, str]
    unused: tuple[str, ...] = field(default=())


def weights_of(bundle: Bundle) -> dict[str, Weights]:
    """What LoRAs may change of a bundle: its UNet and text encoders. Raises EngineError for a graph that is damaged."""
    denoiser = bundle.denoiser
    found = {denoiser: _weights(_shapes(bundle, bundle.graph(denoiser)[0]), text=False)}
    for text in bundle.manifest.text:
        shapes = _shapes(bundle, text.component)
        weights = _weights(shapes, text=True)
        if text.hidden_layer == "penultimate" and not text.pooled:  # the last layer computes nothing that is wanted
            layers = {int(m[1]) for name in shapes if (m := re.search(r"(?:^|\.)encoder\.layers\.(\d+)\.", name))}
            last = f"encoder_layers_{max(layers, default=-1) + 1}_"
            weights = Weights(weights.shapes, weights.spellings, (last, f"text_model_{last}"))
        found[text.component] = weights
    return found


def _shapes(bundle: Bundle, component: str) -> dict[str, tuple[int, ...]]:
    model = (bundle.path / bundle.component(component).file).read_bytes()
    return {name: weight.shape for name, weight in initializers(model).items()
            if name.endswith(".weight") and len(weight.shape) in (2, 4)}


def _weights(shapes: Mapping[str, tuple[int, ...]], text: bool) -> Weights:
    layers = {name.removesuffix(".weight"): name for name in shapes}
    spellings = {_joined(layer): name for layer, name in layers.items()}
    if text:
        bare = {layer.removeprefix("text_model."): name for layer, name in layers.items()}
        spellings |= {_joined(prefix + layer): name for layer, name in bare.items() for prefix in ("", "text_model.")}
    else:
        spellings |= {_joined(name): layers[layer] for name, layer in original_names(layers).items()}
    return Weights(shapes, spellings)


def read_lora(path: Path, models: Mapping[str, Weights]) -> LoraFile:
    """Read a LoRA file for the models that a bundle has (`weights_of`).

    Raises ValueError for a file that is none or is damaged, another kind of adapter, a pair that lacks one half, or
    one whose size is not that of its weight.
    """
    tensors, metadata = read_safetensors(path)
    for kind, pattern in _OTHERS.items():
        if key := next((key for key in tensors if re.fullmatch(pattern, key)), None):
            raise ValueError(f"lora {path}: got {kind} ({key}), expected plain LoRA; merge it into the checkpoint and "
                             "export that")
    halves: dict[tuple[str, str], dict[str, str]] = {}
    unmatched = []
    for key in tensors:
        if (place := _place(key, models)) is None:
            unmatched.append(key)
        elif place.weight:
            keys = halves.setdefault((place.model, place.weight), {})
            if place.role in keys:
                raise ValueError(f"lora {path}: got {keys[place.role]} and {key}, expected one of them; they change "
                                 "the same weight")
            keys[place.role] = key
    configs = _configs(path, metadata)
    pairs: dict[str, dict[str, Pair]] = {model: {} for model in models}
    for (model, name), keys in halves.items():
        if missing := {"down", "up"} - set(keys):
            raise ValueError(f"lora {path}: got {', '.join(keys.values())} without {' and '.join(sorted(missing))}, "
                             "expected both halves of a pair; the file is incomplete")
        values = {role: _float32(tensors[key]) for role, key in keys.items()}
        pairs[model][name] = _pair(f"lora {path}: {keys['up']}", models[model].shapes[name], values,
                                   configs[model].alpha(name) if model in configs else None)
    return LoraFile(pairs, tuple(unmatched))


class _Place(NamedTuple):
    """A key names a place: model, weight ("" where the graph leaves that out), and "down", "up" or "alpha"."""

    model: str
    weight: str
    role: str


def _place(key: str, models: Mapping[str, Weights]) -> _Place | None:
    """None for a key that fits no weight."""
    bare = key.removeprefix("base_model.model.")
    if match := _WEIGHT.fullmatch(bare):
        layer, role = match[1], _ROLES[match[2]]
    elif match := _ALPHA.fullmatch(bare):
        layer, role = match[1], "alpha"
    else:
        return None
    prefix, model = next(((p, m) for p, m in _PREFIXES if layer.startswith(p)), ("", ""))
    spelling = _joined(layer.removeprefix(prefix)).replace("_processor_", "_")
    if spelling.endswith("_to_out"):
        spelling += "_0"
    for name, weights in models.items():
        if model in ("", name):
            for known in (spelling, *_text_spellings(spelling, name)):
                if known in weights.spellings:
                    return _Place(name, weights.spellings[known], role)
            if model and spelling.startswith(weights.unused):
                return _Place(name, "", role)
    return None


def _text_spellings(spelling: str, model: str) -> list[str]:
    return [spelling.removesuffix(old) + new for old, new in _TEXT.items()
            if spelling.endswith(old) and model != "unet"]


def _joined(layer: str) -> str:
    return layer.replace(".", "_")


def _pair(what: str, shape: tuple[int, ...], values: Mapping[str, np.ndarray],
          configured: tuple[float, bool] | None) -> Pair:
    """configured: α, and whether it is divided by √r, as the file's metadata says."""
    down, up = values["down"], values["up"]
    rank = down.shape[0] if down.ndim else 0
    single = math.prod(shape[2:]) == 1  # linear layers and 1x1 convolutions are written either way
    fits = (down.ndim in (2, 4) and up.ndim in (2, 4) and rank > 0 and up.shape[:2] == (shape[0], rank)
            and math.prod(up.shape[2:]) == 1 and down.shape[1] == shape[1]
            and (math.prod(down.shape[2:]) == 1 if single else down.shape[2:] == shape[2:]))
    if not fits:
        raise ValueError(f"{what}: got down {list(down.shape)} and up {list(up.shape)}, expected a pair for a weight "
                         f"of {list(shape)}; take a file that was made for this model")
    alpha, rooted = configured or (float(rank), False)
    if "alpha" in values:
        alpha, rooted = float(values["alpha"].reshape(-1)[0]), False
    if not (np.isfinite(down).all() and np.isfinite(up).all() and math.isfinite(alpha)):
        raise ValueError(f"{what}: got NaN or infinite values, expected finite ones; download the file again")
    return Pair(down.reshape(rank, -1), up.reshape(shape[0], rank), alpha / (math.sqrt(rank) if rooted else rank))


@dataclass(frozen=True)
class _Config:
    """A config is what PEFT's says of α; patterns are regular expressions of ends of layers' names."""

    lora_alpha: float
    alpha_pattern: Mapping[str, float]
    use_rslora: bool

    def alpha(self, weight: str) -> tuple[float, bool]:
        layer = weight.removesuffix(".weight")
        found = (value for pattern, value in self.alpha_pattern.items() if re.fullmatch(rf"(.*\.)?({pattern})", layer))
        return float(next(found, self.lora_alpha)), self.use_rslora


def _configs(path: Path, metadata: Mapping[str, str]) -> dict[str, _Config]:
    """Model → its configuration, of those that the metadata has one for."""
    try:
        flat = json.loads(metadata.get(ADAPTER, "{}"))
        models = {key.partition(".")[0] for key in flat}
        return {model: _Config(flat[f"{model}.lora_alpha"], flat.get(f"{model}.alpha_pattern") or {},
                               bool(flat.get(f"{model}.use_rslora")))
                for model in models if f"{model}.lora_alpha" in flat}
    except (ValueError, AttributeError, TypeError) as e:
        raise ValueError(f"lora {path}: got metadata {ADAPTER} that cannot be read ({e}), expected JSON of PEFT's "
                         "configuration; save the file again") from e


def _float32(value: np.ndarray) -> np.ndarray:
    return widened(np.array(value))  # a copy: the file may change


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors, mapped and not read, and the metadata of a .safetensors file; bfloat16 as uint16.

    The format: a length in 8 bytes, that many of JSON (name → dtype, shape, data_offsets), then the data
    (https://github.com/huggingface/safetensors). Raises ValueError for a file that is none.
    """
    try:
        data = np.memmap(path, np.uint8, "r")
        length = int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:8 + length].tobytes())
        values = data[8 + length:]
        metadata = header.pop(METADATA, {})
        return {name: _tensor(values, about) for name, about in header.items()}, metadata
    except FileNotFoundError as e:
        raise ValueError(f"lora: got {path}, expected a .safetensors file; there is none") from e
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"lora {path}: got a file that cannot be read ({e!r}), expected .safetensors; "
                         "download it again, or convert it") from e


def _tensor(values: np.ndarray, about: Mapping[str, Any]) -> np.ndarray:
    start, end = about["data_offsets"]
    if end > values.size:
        raise ValueError(f"it ends after {values.size} of {end} bytes")
    return np.ascontiguousarray(values[start:end]).view(_DTYPES[about["dtype"]]).reshape(about["shape"])
