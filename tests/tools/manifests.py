"""Bundles without files, of every kind of model, for what reads a manifest only."""

from __future__ import annotations

from pathlib import Path

from engines.bundle import Bundle, Check, Component, Condition, LatentSpec, Manifest

STILLS = ("text-to-image", "image-to-image", "inpaint", "invert")
TASKS = {"sd": (*STILLS, "video"), "inpainting": ("inpaint",), "depth": ("depth-to-image",), "upscaler": ("upscale",),
         "xl": STILLS, "refiner": STILLS[1:]}
MEANINGS = {"inpainting": ("mask", "masked_image"), "depth": ("depth",), "upscaler": ("low_resolution",)}
NUMBERS = {"upscaler": ("noise_level", "noise_level"), "xl": ("sizes", "original_size", "crop", "target_size"),
           "refiner": ("sizes", "original_size", "crop", "aesthetic_score")}
KINDS = tuple(TASKS)


def bundle_of(kind: str) -> Bundle:
    """Return the bundle of a kind of model: 8 pixels a latent, sizes of 8 latents; "sd" has the ControlNet canny."""
    conditions = [Condition(meaning=meaning, input=meaning, source="picture", channels=1)
                  for meaning in MEANINGS.get(kind, ())]
    if kind in NUMBERS:
        meaning, *fields = NUMBERS[kind]
        conditions.append(Condition(meaning=meaning, input=meaning, source="numbers", fields=tuple(fields)))
    roles = {"unet": "denoiser", "vae_decoder": "first_stage_decoder", "vae_encoder": "first_stage_encoder",
             **({"control_canny": "controlnet"} if kind == "sd" else {})}
    components = {name: Component(file="", files={}, dtype="fp32", role=role, network=name, rows="branch", inputs=(),
                                  outputs=(), sites={}, check=Check("", 0, 0.0, 0.0),
                                  label="canny" if role == "controlnet" else "")
                  for name, role in roles.items() if kind != "upscaler" or name != "vae_encoder"}
    return Bundle(Path(f"{kind}.bundle"), Manifest(
        family=kind, tasks=TASKS[kind], components=components, conditions=tuple(conditions),
        scheduler={"_class_name": "DDIMScheduler"}, prediction_type="epsilon",
        latent=LatentSpec(4, 0.18215, 0.0, 8, 8), default_size=(512, 512), files={}, provenance={},
        defaults={"strength": 0.3} if kind in ("xl", "refiner") else {},
        low_res_scheduler={"_class_name": "DDPMScheduler"} if kind == "upscaler" else None,
        max_noise_level=350 if kind == "upscaler" else 0))
