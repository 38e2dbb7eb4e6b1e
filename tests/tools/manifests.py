"""Bundles without files, of every kind of model, for what reads a manifest only."""

from __future__ import annotations

from pathlib import Path

from engines.bundle import Bundle, Check, Component, Condition, LatentSpec, Manifest

BASE = ("text-to-image", "image-to-image", "inpaint", "invert")
TASKS = {"sd": (*BASE, "video"), "inpainting": ("inpaint",), "depth": ("depth-to-image",), "upscaler": ("upscale",),
         "xl": BASE, "refiner": BASE[1:]}
KINDS = tuple(TASKS)
CONDITIONS = {
    "inpainting": (("mask", "picture", 1, ()), ("masked_image", "first_stage", 4, ())),
    "depth": (("depth", "picture", 1, ()),),
    "upscaler": (("low_resolution", "picture", 3, ()), ("noise_level", "numbers", 0, ("noise_level",))),
    "xl": (("sizes", "numbers", 0, ("original_size", "crop", "target_size")),),
    "refiner": (("sizes", "numbers", 0, ("original_size", "crop", "aesthetic_score")),)}


def bundle_of(kind: str) -> Bundle:
    """Return the bundle of a kind of model: 8 pixels a latent, sizes of 8 latents; "sd" has the ControlNet canny."""
    networks = {"unet": "denoiser", **({"control_canny": "controlnet"} if kind == "sd" else {})}
    components = {
        network: Component(file="", files={}, dtype="fp32", role=role, network=network, rows="branch", inputs=(),
                           label="canny" if role == "controlnet" else "", outputs=(), sites={},
                           check=Check("", 0, 0.0, 0.0)) for network, role in networks.items()}
    return Bundle(Path(f"{kind}.bundle"), Manifest(
        family=kind, tasks=TASKS[kind], components=components, scheduler={"_class_name": "DDIMScheduler"},
        conditions=tuple(Condition(meaning=meaning, input=meaning, source=source, channels=channels, fields=fields)
                         for meaning, source, channels, fields in CONDITIONS.get(kind, ())),
        prediction_type="epsilon", latent=LatentSpec(4, 0.18215, 0.0, 8, 8), default_size=(512, 512), files={},
        provenance={}, low_res_scheduler={"_class_name": "DDPMScheduler"} if kind == "upscaler" else None,
        max_noise_level=350 if kind == "upscaler" else 0,
        defaults={"strength": 0.3} if kind in ("xl", "refiner") else {}))
