"""One .safetensors or .ckpt file in the original (CompVis, Stability) layout → a Checkpoint.

Such a file says nothing of its architecture, tokenizer or scheduler: those come from `export/configs` or --config.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextConfig

from export.errors import FAMILIES, ExportError
from export.sources.checkpoint import MODELS, Checkpoint, Text, read_configs, read_json, require_keys
from export.sources.convert import PREFIXES, convert
from export.sources.tokenizer import clip_tokenizer, load_tokenizer
from export.sources.weights import StateDict

logger = logging.getLogger(__name__)

CONFIGS = Path(__file__).parent / "configs"

_CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
_TEXT_KEYS = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
_SD2_BASE_STEPS = 875_000  # of the published 512-base-ema.ckpt
_OTHERS = {"conditioner.embedders.": "Stable Diffusion XL", "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
           "double_blocks.": "FLUX", "control_model.": "a ControlNet", "lora_": "a LoRA"}


def open_single_file(path: Path, config: str | Path | None, tokenizer: str | Path | None) -> Checkpoint:
    """Look at one file. config: a family, a diffusers folder, or None to tell from the weights. Raises ExportError."""
    state = StateDict(path)
    if absent := [prefix for prefix in PREFIXES.values() if not any(name.startswith(prefix) for name in state)]:
        found = next((kind for start, kind in _OTHERS.items() if any(n.startswith(start) for n in state)), "a file")
        raise ExportError(f"{path}: got {found} without weights named {'*, '.join(absent)}*, expected a whole "
                          "Stable Diffusion 1.x or 2.x checkpoint in the original layout; give others that are "
                          "supported as a diffusers folder")
    configs, words = _configuration(path, state, config)
    configs["unet"] = {**configs["unet"], "in_channels": state[_CONV_IN].shape[1]}
    words = load_tokenizer(Path(tokenizer)) if tokenizer else words

    def load(name: str) -> torch.nn.Module:
        return _load(f"{path}: {name}", name, configs[name], convert(state, name, configs[name]))

    return Checkpoint(
        name=path.name, root=path.parent, weights=(path,), unet=configs["unet"], vae=configs["vae"],
        texts=(Text("text_encoder", configs["text_encoder"], words),), scheduler=configs["scheduler"], load=load,
        low_res_scheduler=configs.get("low_res_scheduler"), max_noise_level=configs.get("max_noise_level", 0))


def _configuration(path: Path, state: StateDict, config: str | Path | None) -> tuple[dict[str, Any], Any]:
    """The configurations, and the tokenizer that goes with them."""
    if config is not None and str(config) not in FAMILIES:
        if not Path(config).is_dir():
            raise ExportError(f"config: got {str(config)!r}, expected {', '.join(FAMILIES)} or a diffusers folder")
        return read_configs(Path(config), PREFIXES), load_tokenizer(Path(config) / "tokenizer")
    family = str(config) if config is not None else _family(path, state)
    configs = read_json(CONFIGS / f"{family}.json")
    return configs, clip_tokenizer(configs.pop("pad_token"))


def _family(path: Path, state: StateDict) -> str:
    """Tell 1.x from 2.x by the width of the text. Weights cannot tell whether 2.x predicts epsilon or v."""
    if _CONV_IN not in state or _TEXT_KEYS not in state:
        raise ExportError(f"{path}: no weight named {_TEXT_KEYS}; pass --config DIR, a diffusers folder of the same "
                          "architecture")
    width = state[_TEXT_KEYS].shape[1]
    channels = state[_CONV_IN].shape[1]
    if channels == 7 and width == 1024:
        return "x4"
    if width == 768:
        return "sd1"
    if width != 1024:
        raise ExportError(f"{path}: got a UNet for text of width {width}, expected 768 (Stable Diffusion 1.x) or 1024 "
                          "(2.x); pass --config DIR, a diffusers folder of the same architecture")
    if channels != 4:  # inpainting and depth models were trained from 512-base
        return "sd2-base"
    family = "sd2-base" if state.global_step == _SD2_BASE_STEPS else "sd2-v"
    predicts, other = ("epsilon", "sd2-v") if family == "sd2-base" else ("v", "sd2-base")
    logger.warning("%s: taken for %s (%s prediction), which the weights do not say; if pictures are noise, "
                   "pass --config %s", path.name, family, predicts, other)
    return family


def _load(where: str, name: str, config: Mapping[str, Any], weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    if name != "text_encoder":
        return fit(where, MODELS[name], config, weights)
    model, info = MODELS[name].from_pretrained(
        None, config=CLIPTextConfig.from_dict(dict(config)), state_dict=weights, torch_dtype=torch.float32,
        output_loading_info=True)
    require_keys(where, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    return model.eval()


def fit(where: str, kind: Any, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """A model of class `kind` (of diffusers) with exactly these weights, in eval mode. Raises ExportError."""
    with torch.device("meta"):
        model = kind.from_config(dict(config))
    expected = {key: value.shape for key, value in model.state_dict().items()}
    shapes = {key for key in expected.keys() & weights.keys() if expected[key] != weights[key].shape}
    require_keys(where, expected.keys() - weights.keys(), weights.keys() - expected.keys(), shapes)
    model.load_state_dict(weights, assign=True)
    return model.eval()
