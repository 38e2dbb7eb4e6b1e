"""The diffusers folder that training ends in, and that it starts with."""

import copy
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel

from models.training.parts import build_scheduler, build_text_encoder, build_tokenizer, build_unet, build_vae


def first_unet(start: str | None) -> UNet2DConditionModel:
    """Return a new UNet, or that of an earlier model to go on from."""
    if start is None:
        return build_unet()
    return UNet2DConditionModel.from_pretrained(start, subfolder="unet", torch_dtype=torch.float32)


def trained_unet(work: Path) -> UNet2DConditionModel:
    """Return a UNet with the averaged weights of the last checkpoint; training need not have come to its end."""
    unet = build_unet()
    unet.load_state_dict(torch.load(work / "unet.pt", map_location="cpu")["ema"])
    return unet


def save(work: Path, out: Path, unet: nn.Module) -> None:
    """Write the diffusers folder, fp16, under a temporary name and then rename it."""
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(work / "tokenizer", temporary / "tokenizer")
    AutoencoderKL.from_pretrained(work / "vae").half().save_pretrained(temporary / "vae")
    config = json.loads((temporary / "vae" / "config.json").read_text())
    config.pop("_name_or_path", None)  # where this machine kept it is nobody's business
    (temporary / "vae" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_text_encoder(work / "text_encoder", temporary / "text_encoder")
    half = copy.deepcopy(unet).to("cpu", torch.float16, memory_format=torch.contiguous_format)
    half.save_pretrained(temporary / "unet")
    build_scheduler().save_pretrained(temporary / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": half.config["_diffusers_version"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    temporary.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def save_text_encoder(source: Path, out: Path) -> None:
    """Copy a text encoder as fp16, with tensors named and typed as every reader of Stable Diffusion expects them."""
    encoder = CLIPTextModel.from_pretrained(source).half()
    encoder.save_pretrained(out)
    # transformers 5 leaves out the prefix that its predecessors and every published checkpoint have.
    tensors = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in encoder.state_dict().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    # transformers loads the config's dtype, diffusers float32; a pipeline loaded without a dtype needs both alike.
    config = json.loads((out / "config.json").read_text()) | {"dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def publish_untrained(work: Path, start: str | None) -> None:
    """Give the parts that are not trained yet random weights, so that the folder can be written in its final layout.

    With `start`, the parts that the work folder lacks are those of that earlier model instead.
    """
    tokenizer = build_tokenizer(work / "tokenizer")
    if start is not None:
        for name in ("vae", "text_encoder"):
            if not (work / name).exists():
                shutil.copytree(Path(start) / name, work / name)
    if not (work / "vae").exists():
        build_vae().save_pretrained(work / "vae")
    if not (work / "text_encoder").exists():
        build_text_encoder(tokenizer).save_pretrained(work / "text_encoder")
    if not (work / "latest").exists():
        save(work, work / "latest", first_unet(start))
