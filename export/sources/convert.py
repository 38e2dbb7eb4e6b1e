"""Weight names of the original (CompVis, Stability) layout → those of diffusers and transformers."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    convert_controlnet_checkpoint,
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)

from export.errors import ExportError

logger = logging.getLogger(__name__)

PREFIXES = {"text_encoder": "cond_stage_model.", "unet": "model.diffusion_model.", "vae": "first_stage_model."}
"""Module of a whole checkpoint → what the names of its weights begin with."""
CONTROL = "control_model."
"""What the names of a ControlNet's weights begin with."""
OPEN_CLIP = "cond_stage_model.model."
"""What the names of a text encoder's weights begin with where it is one of OpenCLIP."""

_UNUSED = re.compile(r"cond_stage_model\.(model\.(text_projection|logit_scale|attn_mask)|.*\.position_ids|logit_scale)$"
                     r"|first_stage_model\.(loss|model_ema)\b.*")
_LAYER = re.compile(r"cond_stage_model\.model\.transformer\.resblocks\.(\d+)\.")


def convert(state: Mapping[str, torch.Tensor], component: str, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return float32 weights of "unet", "vae", "text_encoder" or "control" (a ControlNet) by their new names.

    config: of the module, as diffusers or transformers writes it. EMA weights of the UNet are preferred where `state`
    has both. Raises ExportError for names that have no counterpart.
    """
    prefix = CONTROL if component == "control" else PREFIXES[component]
    names = [name for name in state if name.startswith(prefix) and not _unused(name, config)]
    source = _ema(state, names) if component == "unet" else {}
    weights = {name: state[source.get(name, name)].float() for name in names}
    if component == "unet":
        converted = convert_ldm_unet_checkpoint(weights, dict(config))
    elif component == "vae":
        converted = convert_ldm_vae_checkpoint(weights, dict(config))
    elif component == "control":
        found = convert_controlnet_checkpoint(weights, dict(config))
        converted = {name: value for name, value in found.items() if value is not None}  # None is one it looked for
    elif any(name.startswith(OPEN_CLIP) for name in names):
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
        converted = convert_open_clip_checkpoint(model, weights, prefix=OPEN_CLIP)
    else:
        converted = convert_ldm_clip_checkpoint(weights)
    reached = {value.data_ptr() for value in converted.values()}
    left = [name for name, value in weights.items() if value.data_ptr() not in reached and ".in_proj_" not in name]
    if left:  # in_proj_weight and in_proj_bias are cut in three, so they are copies
        raise ExportError(f"{component}: {len(left)} weights have no counterpart in diffusers, such as "
                          f"{', '.join(left[:5])}; this is no Stable Diffusion 1.x or 2.x checkpoint")
    return converted


def _unused(name: str, config: Mapping[str, Any]) -> bool:
    """Tell buffers, heads, losses, and OpenCLIP layers after the one that the UNet is given (the last but one)."""
    layer = _LAYER.match(name)
    return bool(_UNUSED.match(name)) or (layer is not None and int(layer[1]) >= config["num_hidden_layers"])


def _ema(state: Mapping[str, torch.Tensor], names: list[str]) -> dict[str, str]:
    """Map each weight to its exponential moving average, whose name has lost its dots; none where the file has none."""
    averages = {name: "model_ema." + name.removeprefix("model.").replace(".", "") for name in names}
    missing = [name for name, average in averages.items() if average not in state]
    if len(missing) == len(names):
        return {}
    if missing:
        raise ExportError(f"the checkpoint has EMA weights, but none for {len(missing)} of {len(names)} UNet weights, "
                          f"such as {missing[0]}; it is damaged, or merged from two: remove its model_ema.* weights")
    logger.info("the file has both: using the EMA weights of the UNet")
    return averages
