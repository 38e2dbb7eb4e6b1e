"""Architectures whose configurations ship, because a single file says nothing of its own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.errors import ExportError
from export.sources.files import read_json

if TYPE_CHECKING:
    from export.sources.weights import StateDict

logger = logging.getLogger(__name__)

CONFIGS = Path(__file__).parent / "configs"
ARCHITECTURES = ("sd1", "sd2-base", "sd2-v", "x4")
"""Architectures that a whole checkpoint in one file may have: names of files of CONFIGS."""

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
_TEXT_KEYS = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
_SD2_BASE_STEPS = 875_000  # of the published 512-base-ema.ckpt


def shipped(name: str) -> dict[str, Any]:
    """Return the configurations of one of ARCHITECTURES, or of "sdxl": module → what its config.json would say."""
    return read_json(CONFIGS / f"{name}.json")


def tell(path: Path, state: StateDict) -> str:
    """Return the architecture of a whole checkpoint in the original layout, by the shapes of its weights.

    The width of the text tells 1.x from 2.x, input channels tell the upscaler. Weights cannot tell whether 2.x predicts
    epsilon or v: a warning says which is taken. Raises ExportError where it is none of ARCHITECTURES.
    """
    if CONV_IN not in state or _TEXT_KEYS not in state:
        raise ExportError(f"{path}: no weight named {_TEXT_KEYS}; pass --config DIR, a diffusers folder of the same "
                          "architecture")
    width, channels = state[_TEXT_KEYS].shape[1], state[CONV_IN].shape[1]
    if channels == 7 and width == 1024:
        return "x4"
    if width == 768:
        return "sd1"
    if width != 1024:
        raise ExportError(f"{path}: got a UNet for text of width {width}, expected 768 (Stable Diffusion 1.x) or 1024 "
                          "(2.x); pass --config DIR, a diffusers folder of the same architecture")
    if channels != 4:  # inpainting and depth models were trained from 512-base
        return "sd2-base"
    told = "sd2-base" if state.global_step == _SD2_BASE_STEPS else "sd2-v"
    predicts, other = ("epsilon", "sd2-v") if told == "sd2-base" else ("v", "sd2-base")
    logger.warning("%s: taken for %s (%s prediction), which the weights do not say; if pictures are noise, "
                   "pass --config %s", path.name, told, predicts, other)
    return told


def configuration(config: str | Path, name: str) -> Mapping[str, Any]:
    """Return the configuration of module `name` of an architecture, or of a diffusers folder. Raises ExportError."""
    if str(config) in {*ARCHITECTURES, "sdxl"}:
        found: Mapping[str, Any] = shipped(str(config))[name]
        return found
    return read_json(require_folder(config) / name / "config.json")


def require_folder(config: str | Path) -> Path:
    """Return `config` as the path of a folder. Raises ExportError where it is none."""
    if not Path(config).is_dir():
        raise ExportError(f"config: got {str(config)!r}, expected {', '.join(ARCHITECTURES)} or a diffusers folder")
    return Path(config)
