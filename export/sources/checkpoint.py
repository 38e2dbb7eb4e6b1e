"""Checkpoints: one description of a diffusers folder or a single file, whose weights are read a component at a time."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from export.errors import ExportError, first_line
from export.sources.tokenizer import load_tokenizer

MODELS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection,
          "unet": UNet2DConditionModel, "vae": AutoencoderKL}
PIPELINES = {
    **dict.fromkeys(("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
                     "StableDiffusionDepth2ImgPipeline", "StableDiffusionUpscalePipeline"), False),
    **dict.fromkeys(("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline",
                     "StableDiffusionXLInpaintPipeline"), True)}
"""Pipelines that can be exported → whether they are of Stable Diffusion XL."""
PREDICTIONS = ("epsilon", "v_prediction", "sample")
EXTRA_CHANNELS = {0: (), 1: (("depth", 1),), 3: (("low_resolution", 3),), 5: (("mask", 1), ("masked_image", 4))}
"""UNet input channels beside the latent ones → what they mean, in their order."""
TIME_IDS = {6: "sdxl", 5: "sdxl-refiner"}
"""Numbers that condition an XL UNet → its family: original height and width, top and left of the crop, and target
height and width, or the aesthetic score (Podell et al., SDXL, 2023, section 2.2 and appendix)."""

_UNSUPPORTED_UNET = ("class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")


class ExtraChannels(NamedTuple):
    """Input channels of a UNet after the latent ones: their meaning ("mask", "depth" …) and how many there are."""

    meaning: str
    channels: int


class Text(NamedTuple):
    """A text encoder: its name in the folder, its configuration, and its tokenizer."""

    name: str
    config: Mapping[str, Any]
    tokenizer: CLIPTokenizer


@dataclass(frozen=True)
class Checkpoint:
    """A Stable Diffusion model before any weight is read.

    name: its file or folder name. root: folder of `weights`, the files that hold them. unet, vae: their configurations,
    as diffusers writes them. texts: its text encoders, in the order in which their states are joined. scheduler: its
    scheduler_config. load: a name of MODELS → the module with float32 weights, in eval mode; raises ExportError.
    low_res_scheduler, max_noise_level: of an upscaler, the schedule of the noise in its low-resolution input and the
    highest level of it. zero_negative: whether no negative prompt means text of zeros (Stable Diffusion XL).
    """

    name: str
    root: Path
    weights: tuple[Path, ...]
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    texts: tuple[Text, ...]
    scheduler: Mapping[str, Any]
    load: Callable[[str], torch.nn.Module]
    low_res_scheduler: Mapping[str, Any] | None = None
    max_noise_level: int = 0
    zero_negative: bool = False

    def __post_init__(self) -> None:
        for key in _UNSUPPORTED_UNET:
            if self.unet.get(key) is not None:
                raise ExportError(f"{self.name}: got a UNet with {key}={self.unet[key]!r}, expected none; "
                                  "only Stable Diffusion 1.x, 2.x and XL are supported today")
        if self.unet.get("addition_embed_type") and self.time_ids not in TIME_IDS:
            raise ExportError(f"{self.name}: got a UNet that takes {self.time_ids} numbers for sizes, expected 6 as "
                              "the base model does, or 5 as the refiner does")
        if (extra := self.unet.get("in_channels", 4) - self.vae["latent_channels"]) not in EXTRA_CHANNELS:
            raise ExportError(f"{self.name}: got a UNet with {extra} input channels beside the "
                              f"{self.vae['latent_channels']} of the latents, expected 0, 5 (inpainting), 1 (depth) or "
                              "3 (upscaling)")
        upscales = any(channels.meaning == "low_resolution" for channels in self.extra_channels)
        if upscales != bool(self.unet.get("num_class_embeds")) or upscales != (self.low_res_scheduler is not None):
            raise ExportError(
                f"{self.name}: got a UNet with {extra} extra input channels, num_class_embeds="
                f"{self.unet.get('num_class_embeds')!r} and {'a' if self.low_res_scheduler else 'no'} "
                "low_res_scheduler, expected those of an upscaler or none; its folders are of different models")
        prediction = self.scheduler.get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS:
            raise ExportError(f"{self.name}: got prediction_type {prediction!r}, expected {', '.join(PREDICTIONS)}")
        for text in self.texts:
            if len(text.tokenizer) > text.config["vocab_size"]:
                raise ExportError(f"{self.name}: got a tokenizer of {len(text.tokenizer)} tokens for a text encoder of "
                                  f"{text.config['vocab_size']}; pass the model's own with --tokenizer DIR")

    @property
    def family(self) -> str:
        """One of TIME_IDS; "sd1" and "sd2" by their text width; "stable-diffusion" for any other of that layout."""
        if self.time_ids:
            return TIME_IDS[self.time_ids]
        return {768: "sd1", 1024: "sd2"}.get(self.unet["cross_attention_dim"], "stable-diffusion")

    @property
    def extra_channels(self) -> tuple[ExtraChannels, ...]:
        """The UNet's input channels after those of the latents."""
        return tuple(ExtraChannels(*extra) for extra in
                     EXTRA_CHANNELS[self.unet.get("in_channels", 4) - self.vae["latent_channels"]])

    @property
    def pooled_width(self) -> int:
        """Width of the pooled text that an XL UNet takes: that of its last text encoder."""
        return self.texts[-1].config["projection_dim"]

    @property
    def time_ids(self) -> int:
        """Numbers that an XL UNet takes beside the pooled text: what its embedding has room for; 0 for others."""
        if not self.unet.get("addition_embed_type"):
            return 0
        room = self.unet["projection_class_embeddings_input_dim"] - self.pooled_width
        return room // self.unet["addition_time_embed_dim"]

    @property
    def vae_overflows(self) -> bool:
        """Whether the VAE's activations leave the range of float16: diffusers' XL and upscaling pipelines then decode
        in float32."""
        return bool(self.time_ids or self.low_res_scheduler) and bool(self.vae.get("force_upcast", True))

    @property
    def factor(self) -> int:
        """Pixels a latent, along each side."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def multiple(self) -> int:
        """Latent sizes are multiples of this: one halving for each UNet level but the last."""
        return 2 ** (len(self.unet["block_out_channels"]) - 1)

    @property
    def scale(self) -> float:
        return float(self.vae.get("scaling_factor", 0.18215))

    @property
    def shift(self) -> float:
        return float(self.vae.get("shift_factor") or 0.0)

    @property
    def max_length(self) -> int:
        """Tokens a prompt is padded or cut to."""
        return min(n for text in self.texts
                   for n in (text.tokenizer.model_max_length, text.config["max_position_embeddings"]))

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the pictures that the model was trained on."""
        size = self.unet.get("sample_size") or 64
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.factor, width * self.factor


def open_checkpoint(path: Path, config: str | Path | None = None, tokenizer: str | Path | None = None) -> Checkpoint:
    """Look at a diffusers folder or a single file. Arguments are those of `export.export`. Raises ExportError."""
    if path.is_file():
        from export.sources.single_file import open_single_file  # it imports this file

        return open_single_file(path, config, tokenizer)
    if not path.is_dir():
        raise ExportError(f"{path}: no such file or folder; give a diffusers folder or a .safetensors or .ckpt file "
                          "(nothing is downloaded)")
    if config is not None:
        raise ExportError(f"{path}: got a configuration for a folder, which has its own; leave out --config")
    return open_folder(path, tokenizer)


def open_folder(path: Path, tokenizer: str | Path | None = None) -> Checkpoint:
    """Look at a diffusers folder: model_index.json and a subfolder for each component. Raises ExportError."""
    index, names = read_pipeline(path)
    configs = read_configs(path, names)
    texts = [name for name in names if name.startswith("text_encoder")]
    if len(texts) > 1 and tokenizer:
        raise ExportError(f"{path}: got a tokenizer for a model that has two of its own; leave out --tokenizer")
    xl = PIPELINES[index["_class_name"]]
    found, takes = configs["unet"].get("addition_embed_type"), "text_time" if xl else None
    if found != takes:
        raise ExportError(f"{path}: got a UNet with addition_embed_type={found!r}, expected {takes!r} in a "
                          f"{index['_class_name']}; its folders are of different models")
    return Checkpoint(
        name=path.resolve().name, root=path, weights=tuple(f for name in names for f in weight_files(path / name)),
        unet=configs["unet"], vae=configs["vae"], scheduler=configs["scheduler"],
        texts=tuple(Text(name, configs[name], load_tokenizer(
            Path(tokenizer) if tokenizer else path / name.replace("text_encoder", "tokenizer"))) for name in texts),
        low_res_scheduler=configs.get("low_res_scheduler"), max_noise_level=index.get("max_noise_level", 0),
        zero_negative=xl and bool(index.get("force_zeros_for_empty_prompt", True)),
        load=lambda name: load_folder(path / name, MODELS[name]))


def read_pipeline(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """`path`/model_index.json, and which of MODELS it has. Raises ExportError where the pipeline is not supported."""
    file = path / "model_index.json"
    if not file.is_file():
        raise ExportError(f"{path}: not a diffusers folder, it has no model_index.json; give the folder that "
                          "StableDiffusionPipeline.save_pretrained wrote, or one .safetensors or .ckpt file")
    index = read_json(file)
    if (found := index.get("_class_name")) not in PIPELINES:
        raise ExportError(f"{path}: got a {found}, expected one of {', '.join(PIPELINES)}; "
                          "only Stable Diffusion 1.x, 2.x and XL are supported today")
    optional = ("text_encoder", "text_encoder_2") if PIPELINES[found] else ("text_encoder_2",)
    names = tuple(name for name in MODELS if name not in optional or any(index.get(name) or ()))
    if not any(name.startswith("text_encoder") for name in names):
        raise ExportError(f"{file}: got no text encoder, expected one or two; copy the whole checkpoint")
    return index, names


def read_configs(path: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The configurations in a diffusers folder, with the defaults of what they leave out. Raises ExportError."""
    text = {"max_position_embeddings": 77, "vocab_size": 49408, "projection_dim": 512}
    defaults = {"unet": {"in_channels": 4}, "vae": {"latent_channels": 4}, "text_encoder": text, "text_encoder_2": text}
    configs = {name: {**defaults[name], **read_json(path / name / "config.json")} for name in names}
    for name in ("scheduler", "low_res_scheduler"):
        if name == "scheduler" or (path / name).is_dir():
            configs[name] = read_json(path / name / "scheduler_config.json")
    return configs


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object. Raises ExportError where it is missing or not one."""
    try:
        data = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as e:
        raise ExportError(f"{path}: could not be read ({e}); the checkpoint is incomplete, copy it again") from e
    if not isinstance(data, dict):
        raise ExportError(f"{path}: got {type(data).__name__}, expected a JSON object")
    return data


def weight_files(folder: Path) -> list[Path]:
    """The weights of one component as diffusers would choose them: safetensors before .bin, full before fp16."""
    for suffix in (".safetensors", ".bin"):
        files = sorted(f for f in folder.glob(f"*{suffix}")
                       if f.name.startswith(("diffusion_pytorch_model", "model", "pytorch_model")))
        for variant in ("", ".fp16"):
            if found := [f for f in files if (".fp16" in f.name) == bool(variant) and ".non_ema" not in f.name]:
                return found
    raise ExportError(f"{folder}: no weights, expected a .safetensors or .bin file; copy the whole checkpoint")


def load_folder(folder: Path, model: Any) -> torch.nn.Module:
    """One component, of class `model`, with float32 weights and in eval mode. Raises ExportError."""
    files = weight_files(folder)
    try:
        module, info = model.from_pretrained(
            folder, torch_dtype=torch.float32, variant="fp16" if ".fp16" in files[0].name else None,
            use_safetensors=files[0].suffix == ".safetensors", local_files_only=True, output_loading_info=True)
    except (OSError, RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError) as e:
        raise ExportError(f"{folder}: the weights could not be read, or do not fit config.json: {first_line(e)}") from e
    require_keys(str(folder), info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    return module.eval()


def require_keys(where: str, missing: Any, unexpected: Any, shapes: Any) -> None:
    """Raise ExportError if a collection of weight names is not empty, and list them."""
    for keys, what in ((missing, "lack"), (unexpected, "have, and the model does not,"),
                       (shapes, "have another shape of")):
        if keys:
            names = sorted(str(key) for key in keys)
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise ExportError(f"{where}: the weights {what} {', '.join(names[:8])}{more}; "
                              "they do not fit the model's configuration")
