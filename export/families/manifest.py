"""Stable Diffusion in the words of a manifest: what its components are for, and what its denoiser is told.

A bundle's components are named NETWORK[_VARIANT][_PART]; nothing but people reads anything out of these names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from engines.bundle import Component, Condition, DimSpec, Guidance, LatentSpec, Manifest, TextSpec

if TYPE_CHECKING:
    from export.sources.checkpoint import Checkpoint

ROLES = {"unet": "denoiser", "vae_decoder": "first_stage_decoder", "vae_encoder": "first_stage_encoder",
         "text_encoder": "text_encoder", "text_encoder_2": "text_encoder"}
"""Network → its role. Other networks are ControlNets."""

CONTROL = "control_"
"""Beginning of the name of a ControlNet's network; the name that requests have for it follows."""

ROWS: dict[str, int | str] = {"text_encoder": 2, "first_stage_decoder": 1, "first_stage_encoder": 1,
                              "text": 2, "time": 32, "hint": 1}
"""Role, or part of a network → the rows of its engines; others have one for each image and branch of guidance.

A text engine takes the negative prompt and the prompt. Pictures and hints go one by one: it is no slower, and memory
stays that of one. The time part is given the timesteps of a whole schedule, 32 at once.
"""

TASKS = {("mask", "masked_image"): "inpaint", ("depth",): "depth-to-image", ("low_resolution",): "upscale"}
"""Channels joined to the sample → the one task that such a model does."""

SIZES = {6: ("original_size", "crop", "target_size"), 5: ("original_size", "crop", "aesthetic_score")}
"""How many numbers an XL UNet is told beside the pooled text → the options that they are made of; 5 is the refiner."""

TOKENIZERS = {"text_encoder": "tokenizer/tokenizer.json", "text_encoder_2": "tokenizer_2/tokenizer.json"}
"""Text encoder → the file of its tokenizer in a bundle."""


def component_name(network: str, part: str = "", variant: str = "") -> str:
    """Return the name of one graph of a network in the bundle."""
    return "_".join(word for word in (network, variant, part) if word)


def place(network: str, part: str = "", variant: str = "") -> dict[str, Any]:
    """Return what a `Component` says of the graph's place in the model."""
    role = ROLES.get(network, "controlnet")
    return {"role": role, "network": network, "part": part, "variant": variant,
            "label": network.removeprefix(CONTROL) if role == "controlnet" else "",
            "rows": ROWS.get(part or role, "branch")}


def dims(factor: int, multiple: int) -> dict[str, DimSpec]:
    """Return the dimensions of the graphs that follow from the size of the picture.

    factor: pixels a latent. multiple: by what a UNet has halved the latents at its last level.
    """
    levels = [2 ** n for n in range(1, multiple.bit_length())]
    return {dim: spec for side in ("height", "width") for dim, spec in (
        (f"latent_{side}", DimSpec(side, factor)),
        *((f"latent_{side}_{level}", DimSpec(f"latent_{side}", level)) for level in levels))}


def conditions(source: Checkpoint) -> tuple[Condition, ...]:
    """Return what the checkpoint's UNet is told, by the inputs of `export.families.stable_diffusion.UNet`."""
    told = [Condition(meaning="text", input="encoder_hidden_states", source="text_encoder")]
    for meaning, channels in source.extra_channels:
        made_by = "first_stage" if meaning == "masked_image" else "picture"
        told.append(Condition(meaning=meaning, input=meaning, source=made_by, channels=channels))
    if source.unet.get("num_class_embeds"):
        told.append(Condition(meaning="noise_level", input="class_labels", source="numbers", fields=("noise_level",)))
    if source.time_ids:
        told += [Condition(meaning="pooled_text", input="text_embeds", source="text_encoder"),
                 Condition(meaning="sizes", input="time_ids", source="numbers", fields=SIZES[source.time_ids])]
    return tuple(told)


def tasks(source: Checkpoint, components: Mapping[str, Component]) -> tuple[str, ...]:
    """Return what the model does. A refiner draws no picture of its own."""
    if source.extra_channels:
        return (TASKS[tuple(extra.meaning for extra in source.extra_channels)],)
    able = ["text-to-image", "image-to-image", "inpaint", "invert"]
    if any(component.variant == "frames" for component in components.values()):
        able.append("video")
    return tuple(able[1:] if source.time_ids == 5 else able)


def manifest(source: Checkpoint, components: Mapping[str, Component], files: Mapping[str, str],
             provenance: Mapping[str, Any]) -> Manifest:
    """Return the manifest of a checkpoint's bundle. files, provenance: as in `Manifest`."""
    texts = tuple(
        TextSpec(text.name, TOKENIZERS[text.name], source.max_length, text.tokenizer.pad_token_id,
                 "penultimate" if source.time_ids else "last",
                 pooled="text_embeds" if text.name == "text_encoder_2" else "")
        for text in source.texts)
    return Manifest(
        family=source.family, tasks=tasks(source, components), components=components, conditions=conditions(source),
        guidance=Guidance(negative="zeros" if source.zero_negative else "prompt"),
        latent=LatentSpec(channels=source.vae["latent_channels"], scale=source.scale, shift=source.shift,
                          factor=source.factor, multiple=source.multiple),
        text=texts, dims=dims(source.factor, source.multiple), scheduler=source.scheduler,
        prediction_type=source.scheduler.get("prediction_type", "epsilon"),
        low_res_scheduler=source.low_res_scheduler, max_noise_level=source.max_noise_level,
        default_size=source.default_size, defaults={"strength": 0.3} if source.time_ids else {},
        files=files, provenance=provenance)
