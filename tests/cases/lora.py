"""LoRAs of random numbers in several dialects, and what diffusers and latentrt draw with them."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn

from runtime import Lora, Request

ATTENTION = r".*attn[12]\.(to_[qkv]|to_out\.0)"
EVERYTHING = (rf"{ATTENTION}|.*ff\.net\.(0\.proj|2)|.*proj_(in|out)|.*(conv1|conv2|conv_shortcut|time_emb_proj)|"
              r"conv_in|conv_out|time_embedding\.linear_[12]|.*(down|up)samplers\.0\.conv")
TEXT = r".*(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
ALPHA = np.array(1.5, np.float32)
REQUEST = Request("a cat and a horse", "rain", seed=7, steps=3, height=64, width=64)


def write_kohya(path, pipe):
    tensors = {}
    for prefix, model, pattern in (("lora_unet_", pipe.unet, EVERYTHING), ("lora_te_", pipe.text_encoder, TEXT)):
        for name, (down, up) in pairs(model, pattern, seed=1).items():
            name = name if prefix == "lora_unet_" or name.startswith("text_model.") else f"text_model.{name}"
            key = prefix + name.replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": ALPHA}
    save_file(tensors, path)
    return path


def pairs(model: nn.Module, pattern: str, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Layer → (down, up) of random LoRAs that change what it computes by about a fifth."""
    rng = np.random.default_rng(seed)
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and re.fullmatch(pattern, name):
            shape = tuple(module.weight.shape)
            rank = 2 + len(found) % 3
            down = rng.standard_normal((rank, *shape[1:])).astype(np.float32)
            up = rng.standard_normal((shape[0], rank, *(1 for _ in shape[2:]))).astype(np.float32)
            found[name] = down, up * 0.1 * float(module.weight.detach().std())
    return found


def draw_reference(pipe, adapters: dict) -> np.ndarray:
    """What diffusers draws of REQUEST with these files and weights."""
    for n, path in enumerate(adapters):
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=f"a{n}")
    pipe.set_adapters([f"a{n}" for n in range(len(adapters))], list(adapters.values()))
    try:
        return pipe(REQUEST.prompt, negative_prompt=REQUEST.negative_prompt, height=64, width=64,
                    num_inference_steps=REQUEST.steps, guidance_scale=REQUEST.guidance, output_type="np",
                    generator=torch.Generator("cpu").manual_seed(REQUEST.seed)).images
    finally:
        pipe.unload_lora_weights()


def draw(pipe, *loras: Lora) -> np.ndarray:
    return pipe.decode(pipe(dataclasses.replace(REQUEST, loras=loras)).latents)


def load(path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path)


def write(path, tensors) -> str:
    file = f"{path}.safetensors"
    save_file({k: np.asarray(v) for k, v in tensors.items()}, file)
    return file


def to_bfloat16(value: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(value)).to(torch.bfloat16)


def write_bfloat16(path, tensors) -> None:
    from safetensors.torch import save_file as save_torch

    save_torch(tensors, path)


class Noted:
    """Stands for an engine, and notes what it is refitted with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, np.ndarray]] = []

    def refit(self, weights) -> None:
        self.calls.append({name: np.asarray(value) for name, value in weights.items()})
