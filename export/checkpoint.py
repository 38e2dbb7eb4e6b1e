"""Checkpoints: one description of a diffusers folder or a single file, whose weights are read a component at a time."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from export import ExportError, first_line
from export.tokenizer import load_tokenizer

MODELS = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL}
XL_MODELS = {**MODELS, "text_encoder_2": CLIPTextModelWithProjection}
PIPELINES = {"StableDiffusionPipeline": MODELS, "StableDiffusionImg2ImgPipeline": MODELS,
             "StableDiffusionXLPipeline": XL_MODELS}
"""Pipelines that can be exported → the models of each."""
PREDICTIONS = ("epsilon", "v_prediction", "sample")
TIME_IDS = 6
"""Numbers that condition an XL UNet: original height and width, top and left of the crop, target height and width
(Podell et al., SDXL, 2023, section 2.2)."""

_UNSUPPORTED_UNET = ("class_embed_type", "encoder_hid_dim_type", "num_class_embeds", "time_cond_proj_dim")


@dataclass(frozen=True)
class Checkpoint:
    """A Stable Diffusion model before any weight is read.

    name: its file or folder name. root: folder of `weights`, the files that hold them. unet, vae, text_encoder: their
    configurations, as diffusers and transformers write them. scheduler: its scheduler_config. load: "unet", "vae" or
    "text_encoder" → the module with float32 weights, in eval mode; raises ExportError. text_encoder_2, tokenizer_2:
    of Stable Diffusion XL, None for others.
    """

    name: str
    root: Path
    weights: tuple[Path, ...]
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    tokenizer: CLIPTokenizer
    load: Callable[[str], torch.nn.Module]
    text_encoder_2: Mapping[str, Any] | None = None
    tokenizer_2: CLIPTokenizer | None = None

    def __post_init__(self) -> None:
        for key in _UNSUPPORTED_UNET:
            if self.unet.get(key) is not None:
                raise ExportError(f"{self.name}: got a UNet with {key}={self.unet[key]!r}, expected none; "
                                  "only text-to-image Stable Diffusion 1.x, 2.x and XL are supported today")
        found, takes = self.unet.get("addition_embed_type"), "text_time" if self.text_encoder_2 else None
        if found != takes:
            raise ExportError(f"{self.name}: got a UNet with addition_embed_type={found!r}, expected {takes!r} in a "
                              f"model of {len(self.texts)} text encoders; its folders are of different models")
        if self.text_encoder_2 and self.time_ids != TIME_IDS:
            raise ExportError(f"{self.name}: got a UNet that takes {self.time_ids} numbers for sizes, expected "
                              f"{TIME_IDS} as the base model does; the refiner is not supported")
        got, expected = self.unet.get("in_channels", 4), self.vae["latent_channels"]
        if got != expected:
            raise ExportError(f"{self.name}: got a UNet with {got} input channels, expected {expected}; inpainting, "
                              "depth and upscaling checkpoints are not supported yet")
        prediction = self.scheduler.get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS:
            raise ExportError(f"{self.name}: got prediction_type {prediction!r}, expected {', '.join(PREDICTIONS)}")
        for _, config, tokenizer in self.texts:
            if len(tokenizer) > config["vocab_size"]:
                raise ExportError(f"{self.name}: got a tokenizer of {len(tokenizer)} tokens for a text encoder of "
                                  f"{config['vocab_size']}; pass the model's own with --tokenizer DIR")

    @property
    def family(self) -> str:
        """ "sdxl"; "sd1" and "sd2" by their text width; "stable-diffusion" for any other of the same layout."""
        if self.text_encoder_2:
            return "sdxl"
        return {768: "sd1", 1024: "sd2"}.get(self.unet["cross_attention_dim"], "stable-diffusion")

    @property
    def texts(self) -> tuple[tuple[str, Mapping[str, Any], CLIPTokenizer], ...]:
        """Name, configuration and tokenizer of each text encoder, in the order in which their states are joined."""
        first = ("text_encoder", self.text_encoder, self.tokenizer)
        if self.text_encoder_2 is None or self.tokenizer_2 is None:
            return (first,)
        return first, ("text_encoder_2", self.text_encoder_2, self.tokenizer_2)

    @property
    def time_ids(self) -> int:
        """Numbers that an XL UNet takes beside the pooled text: what its embedding has room for."""
        assert self.text_encoder_2
        room = self.unet["projection_class_embeddings_input_dim"] - self.text_encoder_2["projection_dim"]
        return room // self.unet["addition_time_embed_dim"]

    @property
    def vae_overflows(self) -> bool:
        """Whether the VAE's activations leave the range of float16: diffusers' XL pipeline then decodes in float32."""
        return self.family == "sdxl" and bool(self.vae.get("force_upcast", True))

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
        return min(n for _, config, tokenizer in self.texts
                   for n in (tokenizer.model_max_length, config["max_position_embeddings"]))

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the pictures that the model was trained on."""
        size = self.unet.get("sample_size") or 64
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.factor, width * self.factor


def open_checkpoint(path: Path, config: str | Path | None = None, tokenizer: str | Path | None = None) -> Checkpoint:
    """Look at a diffusers folder or a single file. Arguments are those of `export.export`. Raises ExportError."""
    if path.is_file():
        from export.single_file import open_single_file  # it imports this file

        return open_single_file(path, config, tokenizer)
    if not path.is_dir():
        raise ExportError(f"{path}: no such file or folder; give a diffusers folder or a .safetensors or .ckpt file "
                          "(nothing is downloaded)")
    if config is not None:
        raise ExportError(f"{path}: got a configuration for a folder, which has its own; leave out --config")
    return open_folder(path, tokenizer)


def open_folder(path: Path, tokenizer: str | Path | None = None) -> Checkpoint:
    """Look at a diffusers folder: model_index.json and a subfolder for each component. Raises ExportError."""
    models = read_pipeline(path)
    two = "text_encoder_2" in models
    if two and tokenizer:
        raise ExportError(f"{path}: got a tokenizer for a model that has two of its own; leave out --tokenizer")
    weights = tuple(file for name in models for file in weight_files(path / name))
    return Checkpoint(
        name=path.resolve().name, root=path, weights=weights, **read_configs(path, models),
        tokenizer=load_tokenizer(Path(tokenizer) if tokenizer else path / "tokenizer"),
        tokenizer_2=load_tokenizer(path / "tokenizer_2") if two else None,
        load=lambda name: load_folder(path / name, models[name]))


def read_pipeline(path: Path) -> Mapping[str, Any]:
    """The models of the pipeline that `path`/model_index.json names. Raises ExportError where it is not supported."""
    index = path / "model_index.json"
    if not index.is_file():
        raise ExportError(f"{path}: not a diffusers folder, it has no model_index.json; give the folder that "
                          "StableDiffusionPipeline.save_pretrained wrote, or one .safetensors or .ckpt file")
    found = read_json(index).get("_class_name")
    if found not in PIPELINES:
        raise ExportError(f"{path}: got a {found}, expected one of {', '.join(PIPELINES)}; "
                          "only text-to-image Stable Diffusion 1.x, 2.x and XL are supported today")
    return PIPELINES[found]


def read_configs(path: Path, models: Mapping[str, Any] = MODELS) -> dict[str, Any]:
    """The configurations in a diffusers folder, with the defaults of what they leave out. Raises ExportError."""
    text = {"max_position_embeddings": 77, "vocab_size": 49408}
    defaults: dict[str, dict[str, Any]] = {
        "unet": {"in_channels": 4}, "vae": {"latent_channels": 4}, "text_encoder": text,
        "text_encoder_2": {"projection_dim": 512, **text}}
    return {**{name: {**defaults[name], **read_json(path / name / "config.json")} for name in models},
            "scheduler": read_json(path / "scheduler" / "scheduler_config.json")}


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
