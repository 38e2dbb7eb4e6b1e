"""Stable Diffusion in the words of a manifest: what its denoiser is told, what it does, and sizes of its graphs."""

from __future__ import annotations

from collections.abc import Mapping

from engines.bundle import Condition, DimSpec

TASKS = {("mask", "masked_image"): "inpaint", ("depth",): "depth-to-image", ("low_resolution",): "upscale"}
"""Channels joined to the sample → the one task that such a model does."""

SIZES = {6: ("original_size", "crop", "target_size"), 5: ("original_size", "crop", "aesthetic_score")}
"""How many numbers an XL UNet is told beside the pooled text → the options that they are made of; 5 is the refiner."""


def dims(factor: int, multiple: int) -> dict[str, DimSpec]:
    """Return the dimensions of the graphs that follow from the size of the picture.

    factor: pixels a latent. multiple: by what a UNet has halved the latents at its last level.
    """
    levels = [2 ** n for n in range(1, multiple.bit_length())]
    return {dim: spec for side in ("height", "width") for dim, spec in (
        (f"latent_{side}", DimSpec(side, factor)),
        *((f"latent_{side}_{level}", DimSpec(f"latent_{side}", level)) for level in levels))}


def conditions(joined: Mapping[str, int], noise_level: bool, numbers: int) -> tuple[Condition, ...]:
    """Return what a UNet is told, by the inputs of `export.families.unet.UNet`.

    joined: meaning of the channels joined to the sample → how many. noise_level: whether it is told how much noise is
    in its picture. numbers: a key of SIZES, or 0.
    """
    told = [Condition(meaning="text", input="encoder_hidden_states", source="text_encoder")]
    for meaning, channels in joined.items():
        source = "first_stage" if meaning == "masked_image" else "picture"
        told.append(Condition(meaning=meaning, input=meaning, source=source, channels=channels))
    if noise_level:
        told.append(Condition(meaning="noise_level", input="class_labels", source="numbers", fields=("noise_level",)))
    if numbers:
        told += [Condition(meaning="pooled_text", input="text_embeds", source="text_encoder"),
                 Condition(meaning="sizes", input="time_ids", source="numbers", fields=SIZES[numbers])]
    return tuple(told)


def tasks(joined: Mapping[str, int], numbers: int, frames: bool) -> tuple[str, ...]:
    """Return what a model does: the arguments are those of `conditions`. A refiner draws no picture of its own.

    frames: whether it has the graph for videos.
    """
    if joined:
        return (TASKS[tuple(joined)],)
    able = ("text-to-image", "image-to-image", "inpaint", "invert", *(("video",) if frames else ()))
    return able[1:] if numbers == 5 else able
