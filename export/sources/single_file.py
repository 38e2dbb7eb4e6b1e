"""A whole model as one .safetensors or .ckpt file in the original (CompVis, Stability) layout.

Such a file says nothing of its architecture, tokenizer or scheduler: those come from
`export.sources.architectures` or --config.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers import CLIPTokenizer

from export.errors import ExportError
from export.sources.architectures import ARCHITECTURES, CONV_IN, require_folder, shipped, tell
from export.sources.convert import PREFIXES, convert
from export.sources.folder import read_config
from export.sources.modules import fit
from export.sources.tokenizer import clip_tokenizer, load_tokenizer
from export.sources.weights import StateDict

_OTHERS = {"conditioner.embedders.": "Stable Diffusion XL", "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
           "double_blocks.": "FLUX", "control_model.": "a ControlNet", "lora_": "a LoRA"}
"""What the names of weights in other files begin with → what such a file is."""


@dataclass(frozen=True)
class SingleFile:
    """An `export.sources.checkpoint.Checkpoint`. configs: of its modules and schedulers. words: its tokenizer."""

    path: Path
    state: StateDict
    configs: Mapping[str, Any]
    words: CLIPTokenizer
    pipeline: ClassVar[str] = "StableDiffusionPipeline"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def root(self) -> Path:
        return self.path.parent

    @property
    def options(self) -> Mapping[str, Any]:
        return self.configs

    def has(self, name: str) -> bool:
        return name in self.configs

    def config(self, name: str) -> dict[str, Any]:
        return dict(self.configs[name])

    def tokenizer(self, text_encoder: str) -> CLIPTokenizer:
        return self.words

    def weights(self, names: Iterable[str]) -> tuple[Path, ...]:
        return (self.path,)

    def load(self, name: str, kind: Any) -> nn.Module:
        config = self.configs[name]
        return fit(f"{self.path}: {name}", kind, config, convert(self.state, name, config))


def open_single_file(path: Path, config: str | Path | None, tokenizer: str | Path | None) -> SingleFile:
    """Look at one file. config: one of ARCHITECTURES, a diffusers folder, or None to tell from the weights.

    tokenizer: a folder to use instead of the architecture's. Raises ExportError.
    """
    state = StateDict(path)
    if absent := [prefix for prefix in PREFIXES.values() if not any(name.startswith(prefix) for name in state)]:
        found = next((kind for start, kind in _OTHERS.items() if any(n.startswith(start) for n in state)), "a file")
        raise ExportError(f"{path}: got {found} without weights named {'*, '.join(absent)}*, expected a whole "
                          "Stable Diffusion 1.x or 2.x checkpoint in the original layout; give others that are "
                          "supported as a diffusers folder")
    if config is None or str(config) in ARCHITECTURES:
        configs = shipped(str(config) if config is not None else tell(path, state))
        words = clip_tokenizer(configs.pop("pad_token"))
    else:
        folder = require_folder(config)
        names = [*PREFIXES, "scheduler", *(["low_res_scheduler"] if (folder / "low_res_scheduler").is_dir() else [])]
        configs = {name: read_config(folder, name) for name in names}
        words = load_tokenizer(folder / "tokenizer")
    configs["unet"] = {**configs["unet"], "in_channels": state[CONV_IN].shape[1]}
    return SingleFile(path, state, configs, load_tokenizer(Path(tokenizer)) if tokenizer else words)
