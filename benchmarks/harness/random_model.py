"""Full-size models with random weights, so that speed can be measured without a download."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from pathlib import Path
from typing import Any

from tqdm import tqdm

import export
from benchmarks.harness import measure
from engines.bundle import MANIFEST, hash_file
from engines.bundle.publish import publish

INDEX = "model_index.json"
FAMILIES = ("sd1", "sd2-base", "sd2-v", "sdxl")
"""Models that can be made."""
DTYPE = "fp32; sdxl: fp16"
"""Default precisions of their bundles, in words."""


def make(family: str, seed: int = 0, directory: Path | None = None, dtype: str = "") -> tuple[Path, Path]:
    """Return (bundle, checkpoint) of one of FAMILIES, made where they are not there yet.

    sd1 takes 2.3 GB in fp16 and a bundle with the same values, 4.6 GB in fp32; sdxl 7 GB each, both in fp16.

    seed: the weights'. directory: where to keep them, by default $XDG_CACHE_HOME/latentrt/random. dtype: the
    bundle's, by default fp32, and fp16 for sdxl.

    Raises ValueError for another family, or where memory does not hold the UNet; EngineError or ExportError where they
    cannot be written.
    """
    if family not in FAMILIES:
        raise ValueError(f"--random: got {family!r}, expected one of {', '.join(FAMILIES)}")
    dtype = dtype or ("fp16" if family == "sdxl" else "fp32")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    here = (directory or cache / "latentrt" / "random") / f"{family}-{seed}"
    checkpoint, bundle = here / "checkpoint", here / f"bundle-{dtype}-{_exporter()}"
    if not (checkpoint / INDEX).is_file() or not (bundle / MANIFEST).is_file():
        measure.require_memory(round(measure.SHARE * _float_bytes(family)), f"--random {family}")
    if not (checkpoint / INDEX).is_file():
        with publish(checkpoint, force=True) as temporary:
            _save(family, seed, temporary)
    if not (bundle / MANIFEST).is_file():
        for old in here.glob(f"bundle-{dtype}-*"):
            shutil.rmtree(old)
        export.export(checkpoint, bundle, dtype=dtype)
    return bundle, checkpoint


def _exporter() -> str:
    """Return the hash of the code that exports: a bundle is made anew when it has changed."""
    files = sorted(Path(export.__file__).parent.rglob("*.py"))
    return hashlib.sha256("".join(hash_file(file) for file in files).encode()).hexdigest()[:8]


def _float_bytes(family: str) -> int:
    """Return the bytes of a family's UNet in float32."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(_config(family)["unet"])
    return 4 * sum(parameter.numel() for parameter in unet.parameters())


def _config(family: str) -> dict[str, Any]:
    from export.sources.architectures import shipped

    return shipped(family)


def _save(family: str, seed: int, path: Path) -> None:
    import diffusers
    import torch
    import transformers

    from export.sources.tokenizer import clip_tokenizer

    config, generator = _config(family), torch.Generator().manual_seed(seed)
    with tqdm(total=5, desc=f"random {family}", unit="part", disable=None) as bar:
        models: dict[str, Any] = {}
        for name, cls in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
            with torch.device("meta"):
                model = cls.from_config(config[name])
            models[name] = fill(torch.nn.Module.to(model, torch.float16).to_empty(device="cpu"), generator)
            bar.update()
        torch.manual_seed(seed)
        models["text_encoder"] = _text(transformers.CLIPTextModel, config["text_encoder"])
        bar.update()
        models["tokenizer"] = clip_tokenizer(config["pad_token"])
        if family == "sdxl":
            pipeline = diffusers.StableDiffusionXLPipeline
            models["text_encoder_2"] = _text(transformers.CLIPTextModelWithProjection, config["text_encoder_2"])
            models["tokenizer_2"] = clip_tokenizer(config["pad_token_2"])
        else:
            pipeline = diffusers.StableDiffusionPipeline
            models |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        bar.update()
        scheduler = getattr(diffusers, config["scheduler"]["_class_name"]).from_config(config["scheduler"])
        transformers.logging.disable_progress_bar()  # of its own, under ours
        pipeline(**models, scheduler=scheduler).save_pretrained(path)
        transformers.logging.enable_progress_bar()
        bar.update()


def _text(model: Any, config: dict[str, Any]) -> Any:
    from transformers import CLIPTextConfig

    return model(CLIPTextConfig.from_dict(config)).half()  # its own initialisation is sane


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
