"""Full-size models with random weights, so that speed can be measured without a download."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engines.bundle import MANIFEST
from engines.publish import publish
from export import FAMILIES, export

INDEX = "model_index.json"

__all__ = ["FAMILIES", "make"]


def make(family: str, seed: int = 0, directory: Path | None = None) -> tuple[Path, Path]:
    """(bundle, checkpoint) of one of export.FAMILIES, made where they are not there yet: 2.3 GB in fp16 and the bundle
    in fp32 with the same values, 4.6 GB (sizes of sd1). Random Stable Diffusion XL waits for its export.

    seed: of the weights. directory: where to keep them, by default $XDG_CACHE_HOME/latentrt/random. Raises ValueError
    for another family, EngineError or ExportError where they cannot be written.
    """
    if family not in FAMILIES:
        raise ValueError(f"--random: got {family!r}, expected one of {', '.join(FAMILIES)}; export does not know "
                         "other architectures yet, SDXL included")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    here = (directory or cache / "latentrt" / "random") / f"{family}-{seed}"
    checkpoint, bundle = here / "checkpoint", here / "bundle"
    if not (checkpoint / INDEX).is_file():
        with publish(checkpoint, force=True) as temporary:
            _save(family, seed, temporary)
    if not (bundle / MANIFEST).is_file():
        export(checkpoint, bundle)
    return bundle, checkpoint


def _save(family: str, seed: int, path: Path) -> None:
    import diffusers
    import torch
    import transformers
    from transformers import CLIPTextConfig, CLIPTextModel

    from export.checkpoint import read_json
    from export.single_file import CONFIGS
    from export.tokenizer import clip_tokenizer

    config = read_json(CONFIGS / f"{family}.json")
    generator = torch.Generator().manual_seed(seed)
    with tqdm(total=4, desc=f"random {family}", unit="part", disable=None) as bar:
        models: dict[str, Any] = {}
        for name, cls in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
            with torch.device("meta"):
                model = cls.from_config(config[name])
            models[name] = fill(torch.nn.Module.to(model, torch.float16).to_empty(device="cpu"), generator)
            bar.update()
        torch.manual_seed(seed)
        text = CLIPTextModel(CLIPTextConfig.from_dict(config["text_encoder"])).half()  # its own initialisation is sane
        bar.update()
        scheduler = getattr(diffusers, config["scheduler"]["_class_name"]).from_config(config["scheduler"])
        transformers.logging.disable_progress_bar()  # of its own, under ours
        diffusers.StableDiffusionPipeline(
            **models, text_encoder=text, tokenizer=clip_tokenizer(config["pad_token"]), scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False).save_pretrained(path)
        transformers.logging.enable_progress_bar()
        bar.update()


def fill(model: Any, generator: Any) -> Any:
    """Give a torch module random weights that keep activations near unit variance; norms become the identity.

    generator: a torch.Generator; the same state gives the same weights.
    """
    from torch import nn

    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                nn.init.constant_(value, float(name == "weight"))
            elif value.ndim < 2:
                nn.init.zeros_(value)
            else:
                value.data.normal_(std=1 / math.sqrt(value[0].numel()), generator=generator)
    return model
