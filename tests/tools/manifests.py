"""Bundles without files, of every kind of model, for what reads a manifest only."""

from __future__ import annotations

from pathlib import Path

from engines.bundle import Bundle, Check, Component, ExtraChannels, LatentSpec, Manifest
from engines.spec import TensorSpec

MEANINGS = {"inpainting": ("mask", "masked_image"), "depth": ("depth",), "upscaler": ("low_resolution",)}
NUMBERS = {"xl": 6, "refiner": 5}
KINDS = ("sd", *MEANINGS, *NUMBERS)


def bundle_of(kind: str) -> Bundle:
    """The bundle of a kind of model: 8 pixels a latent, sizes of 8 latents; "sd" has the ControlNet canny."""
    numbers = (TensorSpec("time_ids", "float32", ("batch", NUMBERS[kind])),) if kind in NUMBERS else ()
    names = ["unet", "vae_decoder", *(["vae_encoder"] if kind != "upscaler" else []),
             *(["unet_frames", "control_canny"] if kind == "sd" else [])]
    components = {name: Component("", {}, "fp32", numbers if name == "unet" else (), (), {}, Check("", 0, 0.0, 0.0))
                  for name in names}
    return Bundle(Path(f"{kind}.bundle"), Manifest(
        family=kind, components=components, scheduler={"_class_name": "DDIMScheduler"}, prediction_type="epsilon",
        latent=LatentSpec(4, 0.18215, 0.0, 8, 8), text=(), default_size=(512, 512), files={}, provenance={},
        extra_channels=tuple(ExtraChannels(meaning, 1) for meaning in MEANINGS.get(kind, ())),
        low_res_scheduler={"_class_name": "DDPMScheduler"} if kind == "upscaler" else None,
        max_noise_level=350 if kind == "upscaler" else 0))
