"""Weights of a diffusers folder under their original (CompVis, Stability) names: `export.sources.convert` backwards.

It is written from the original modules' structure, and not from the converter, so that the two check each other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
UNET = {"class_embedding": "label_emb", "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0", "conv_out": "out.2"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}

Weights = Mapping[str, torch.Tensor]


def from_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a folder that `models.tiny` wrote by original names; SD 2's text encoder by OpenCLIP's."""
    unet, vae, text = (load_file(next((folder / n).glob("*.safetensors"))) for n in ("unet", "vae", "text_encoder"))
    linear = json.loads((folder / "unet" / "config.json").read_text()).get("use_linear_projection")
    return state_dict(unet, vae, text, layers_per_block=1, open_clip=bool(linear))


def of_control(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a ControlNet's folder that `models.tiny` wrote by their original names."""
    weights = load_file(next(folder.glob("*.safetensors")))
    return {f"control_model.{_control_name(name)}": value for name, value in weights.items()}


def of_vae(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a VAE's folder by original names, without a prefix, as files of a VAE alone have them."""
    return _vae(load_file(next(folder.glob("*.safetensors"))))


def save(state: Weights, path: Path, nested: bool = True) -> Path:
    """Write a .safetensors or a pickle, in which the weights are under "state_dict" if nested; returns `path`."""
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save({"state_dict": dict(state), "global_step": 1} if nested else dict(state), path)
    return path


def state_dict(unet: Weights, vae: Weights, text: Weights, layers_per_block: int,
               open_clip: bool) -> dict[str, torch.Tensor]:
    """Return all weights of one checkpoint, as in the file's "state_dict"."""
    lowest = any(k.startswith("up_blocks.0.attentions.") for k in unet)
    return {
        **{f"model.diffusion_model.{_unet_name(k, layers_per_block, lowest)}": v for k, v in unet.items()},
        **{f"first_stage_model.{name}": v for name, v in _vae(vae).items()},
        **(_open_clip(text) if open_clip else _clip(text)),
        "betas": torch.linspace(0, 1, 10),
    }


def with_ema(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights with the UNet's as model_ema.*, names without dots, and other values in their place."""
    prefix = "model.diffusion_model."
    averages = {"model_ema." + k.removeprefix("model.").replace(".", ""): v
                for k, v in state.items() if k.startswith(prefix)}
    trained = {k: v + 1 if k.startswith(prefix) else v for k, v in state.items()}
    return {**trained, **averages, "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


def _control_name(name: str) -> str:
    module, _, parameter = name.rpartition(".")
    kind, _, rest = module.partition(".")
    if kind == "controlnet_cond_embedding":  # every other layer of the sequence is a SiLU
        at = {"conv_in": 0, "conv_out": 14}.get(rest)
        return f"input_hint_block.{2 * (int(rest.split('.')[1]) + 1) if at is None else at}.{parameter}"
    if kind == "controlnet_down_blocks":
        return f"zero_convs.{rest}.0.{parameter}"
    return f"middle_block_out.0.{parameter}" if kind == "controlnet_mid_block" else _unet_name(name, layers=1)


def _unet_name(name: str, layers: int, lowest: bool = False) -> str:
    """Return the original name of a weight of the UNet. lowest: the lowest block has transformers, too."""
    place, _, rest = name.partition(".")
    module, _, parameter = name.rpartition(".")
    if module in UNET:
        return f"{UNET[module]}.{parameter}"
    if place == "mid_block":
        kind, index, inner = rest.split(".", 2)
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}.{_inner(kind, inner)}"
    block, kind, index, inner = rest.split(".", 3)
    first = int(block) * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op.{inner.removeprefix('conv.')}"
    if kind == "upsamplers":  # after the resnet and, where there is one, the transformer
        return f"output_blocks.{first + layers}.{2 if lowest or block != '0' else 1}.{inner}"
    at = first + int(index)
    which = f"input_blocks.{1 + at}" if place == "down_blocks" else f"output_blocks.{at}"
    return f"{which}.{1 if kind == 'attentions' else 0}.{_inner(kind, inner)}"


def _inner(kind: str, inner: str) -> str:
    if kind == "attentions":
        return inner
    module, _, parameter = inner.rpartition(".")
    return f"{RESNET[module]}.{parameter}"


def _vae(weights: Weights) -> dict[str, torch.Tensor]:
    top = max(int(k.split(".")[2]) for k in weights if k.startswith("decoder.up_blocks."))
    return {(name := _vae_name(k, top)): v[:, :, None, None] if _is_conv(name, v) else v for k, v in weights.items()}


def _vae_name(name: str, top: int) -> str:
    if "mid_block.attentions" in name:
        half, inner = name.split(".mid_block.attentions.0.")
        module, _, parameter = inner.rpartition(".")
        return f"{half}.mid.attn_1.{VAE_ATTENTION[module]}.{parameter}"
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{top - int(m[1])}.block.", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{top - int(m[1])}.upsample", name)
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def _is_conv(name: str, value: torch.Tensor) -> bool:
    return "attn_1" in name and value.ndim == 2


def _clip(text: Weights) -> dict[str, torch.Tensor]:
    names = {f"cond_stage_model.transformer.text_model.{k.removeprefix('text_model.')}": v for k, v in text.items()}
    return {**names, "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}


def _open_clip(text: Weights) -> dict[str, torch.Tensor]:
    """Return a text encoder's weights as OpenCLIP has them.

    Query, key and value are one matrix, and there is a layer more than the UNet is given, and a projection to pictures.
    """
    out, start = {}, "cond_stage_model.model."
    text = {k.removeprefix("text_model."): v for k, v in text.items()}
    for name, value in text.items():
        if found := re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name):
            layer, module, parameter = found.groups()
            block = f"{start}transformer.resblocks.{layer}."
            if module == "self_attn.q_proj":
                parts = [text[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                out[f"{block}attn.in_proj_{parameter}"] = torch.cat(parts)
            elif module in OPEN_CLIP:
                out[f"{block}{OPEN_CLIP[module]}.{parameter}"] = value
        elif name.startswith("final_layer_norm"):
            out[name.replace("final_layer_norm", f"{start}ln_final")] = value
    out[f"{start}token_embedding.weight"] = text["embeddings.token_embedding.weight"]
    out[f"{start}positional_embedding"] = text["embeddings.position_embedding.weight"]
    last = max(int(name.split(".")[2]) for name in text if name.startswith("encoder.layers."))
    unused = {k.replace(f"resblocks.{last}.", f"resblocks.{last + 1}."): v + 1
              for k, v in out.items() if f"resblocks.{last}." in k}
    width = out[f"{start}positional_embedding"].shape[1]
    return {**out, **unused, f"{start}text_projection": torch.eye(width), f"{start}logit_scale": torch.tensor(4.6)}
