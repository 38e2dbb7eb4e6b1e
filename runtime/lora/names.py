"""Names of a UNet's layers in the layout that Stable Diffusion was published in, which many LoRA files use.

That layout numbers the blocks of each half through (https://github.com/CompVis/stable-diffusion, openaimodel.py); the
diffusers layout names them by level and kind. Both are the same layers in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_TOP = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2"}
_RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
           "conv_shortcut": "skip_connection"}
_MIDDLE = {"resnets.0": "middle_block.0", "attentions.0": "middle_block.1", "resnets.1": "middle_block.2"}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MID_BLOCK = re.compile(r"mid_block\.((resnets|attentions)\.\d+)\.(.+)")


def original_names(layers: Collection[str]) -> dict[str, str]:
    """Name in the original layout → name in diffusers' for those of a UNet's `layers` that have one.

    "input_blocks.4.1.proj_in" → "down_blocks.1.attentions.0.proj_in" where a level has two residual blocks.
    """
    stride = 1 + len({match[4] for layer in layers if (match := _BLOCK.fullmatch(layer))
                      and match[1] == "down" and match[2] == "0" and match[3] == "resnets"})
    attended = {match[2] for layer in layers if (match := _BLOCK.fullmatch(layer))
                and match[1] == "up" and match[3] == "attentions"}
    found = {}
    for layer in layers:
        if (name := _original(layer, stride, attended)) is not None:
            found[name] = layer
    return found


def _original(layer: str, stride: int, attended: Collection[str]) -> str | None:
    """stride: numbered blocks of a level. attended: levels of the upper half that have attention."""
    if layer in _TOP:
        return _TOP[layer]
    if (match := _MID_BLOCK.fullmatch(layer)) and match[1] in _MIDDLE:
        return f"{_MIDDLE[match[1]]}.{_inner(match[2], match[3])}"
    if not (match := _BLOCK.fullmatch(layer)):
        return None
    half, level, kind, index, rest = match.groups()
    first = int(level) * stride
    if kind == "downsamplers":
        return f"input_blocks.{first + stride}.0.op" if rest == "conv" else None
    if kind == "upsamplers":
        return f"output_blocks.{first + stride - 1}.{2 if level in attended else 1}.{rest}"
    block = f"input_blocks.{first + int(index) + 1}" if half == "down" else f"output_blocks.{first + int(index)}"
    return f"{block}.{0 if kind == 'resnets' else 1}.{_inner(kind, rest)}"


def _inner(kind: str, rest: str) -> str:
    return _RESNET.get(rest, rest) if kind == "resnets" else rest
