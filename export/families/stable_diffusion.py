"""Stable Diffusion 1.x, 2.x and XL: the base models, and those for inpainting, depth, upscaling and refining."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from engines.bundle import Component, DimSpec, Guidance, LatentSpec, Manifest, TextSpec
from export.errors import ExportError
from export.families.autoencoder import VAEDecoder, VAEEncoder, pixels_a_latent
from export.families.autoencoder import precision as vae_precision
from export.families.family import latent_sizes
from export.families.manifest import conditions, dims, tasks
from export.families.text_encoders import FirstXLTextEncoder, SecondXLTextEncoder, TextEncoder
from export.families.unet import UNet
from export.sources.checkpoint import Checkpoint
from export.trace.traced_module import TracedModule

PIPELINES = {
    **dict.fromkeys(("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
                     "StableDiffusionDepth2ImgPipeline", "StableDiffusionUpscalePipeline"), False),
    **dict.fromkeys(("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline",
                     "StableDiffusionXLInpaintPipeline"), True)}
"""Pipelines that draw with these models → whether they are of Stable Diffusion XL."""
PREDICTIONS = ("epsilon", "v_prediction", "sample")
EXTRA_CHANNELS: Mapping[int, Mapping[str, int]] = {
    0: {}, 1: {"depth": 1}, 3: {"low_resolution": 3}, 5: {"mask": 1, "masked_image": 4}}
"""UNet input channels beside the latent ones → what they mean, in their order, and how many each has."""
TIME_IDS = {6: "sdxl", 5: "sdxl-refiner"}
"""Numbers that condition an XL UNet → its family: original height and width, top and left of the crop, and target
height and width, or the aesthetic score (Podell et al., SDXL, 2023, section 2.2 and appendix)."""
TEXTS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
"""Text encoder → its class in transformers."""
TOKENIZERS = {"text_encoder": "tokenizer/tokenizer.json", "text_encoder_2": "tokenizer_2/tokenizer.json"}
"""Text encoder → the file of its tokenizer in a bundle."""

_UNSUPPORTED_UNET = ("class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
_TEXT_DEFAULTS = {"max_position_embeddings": 77, "vocab_size": 49408, "projection_dim": 512}


class Text(NamedTuple):
    """A text encoder: its name in the folder, its configuration, and its tokenizer."""

    name: str
    config: Mapping[str, Any]
    tokenizer: CLIPTokenizer


@dataclass(frozen=True)
class StableDiffusion:
    """A Stable Diffusion model before any weight is read: an `export.families.family.Family`.

    unet, vae: their configurations, as diffusers writes them. texts: its text encoders, in the order in which their
    states are joined. scheduler: its scheduler_config. low_res_scheduler, max_noise_level: of an upscaler, the schedule
    of the noise in its low-resolution input and the highest level of it. zero_negative: whether no negative prompt
    means text of zeros (Stable Diffusion XL).
    """

    pipelines: ClassVar = tuple(PIPELINES)
    title: ClassVar = "Stable Diffusion 1.x, 2.x and XL"

    checkpoint: Checkpoint
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    texts: tuple[Text, ...]
    scheduler: Mapping[str, Any]
    low_res_scheduler: Mapping[str, Any] | None = None
    max_noise_level: int = 0
    zero_negative: bool = False

    @classmethod
    def recognises(cls, checkpoint: Checkpoint) -> bool:
        return checkpoint.pipeline in PIPELINES

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> Self:
        """Read its configurations. Raises ExportError for what is not supported."""
        xl = PIPELINES[checkpoint.pipeline]
        names = [name for name in TEXTS if checkpoint.has(name) and (xl or name == "text_encoder")]
        if not names:
            raise ExportError(f"{checkpoint.root / 'model_index.json'}: got no text encoder, expected one or two; copy "
                              "the whole checkpoint")
        unet = {"in_channels": 4, **checkpoint.config("unet")}
        found, takes = unet.get("addition_embed_type"), "text_time" if xl else None
        if found != takes:
            raise ExportError(f"{checkpoint.root}: got a UNet with addition_embed_type={found!r}, expected {takes!r} "
                              f"in a {checkpoint.pipeline}; its folders are of different models")
        return cls(
            checkpoint, unet, {"latent_channels": 4, **checkpoint.config("vae")},
            tuple(Text(name, {**_TEXT_DEFAULTS, **checkpoint.config(name)}, checkpoint.tokenizer(name))
                  for name in names),
            checkpoint.config("scheduler"),
            checkpoint.config("low_res_scheduler") if checkpoint.has("low_res_scheduler") else None,
            checkpoint.options.get("max_noise_level", 0),
            xl and bool(checkpoint.options.get("force_zeros_for_empty_prompt", True)))

    def __post_init__(self) -> None:
        for key in _UNSUPPORTED_UNET:
            if self.unet.get(key) is not None:
                raise ExportError(f"{self.name}: got a UNet with {key}={self.unet[key]!r}, expected none; "
                                  f"only {self.title} are supported today")
        if self.unet.get("addition_embed_type") and self.time_ids not in TIME_IDS:
            raise ExportError(f"{self.name}: got a UNet that takes {self.time_ids} numbers for sizes, expected 6 as "
                              "the base model does, or 5 as the refiner does")
        if (extra := self.unet["in_channels"] - self.vae["latent_channels"]) not in EXTRA_CHANNELS:
            raise ExportError(f"{self.name}: got a UNet with {extra} input channels beside the "
                              f"{self.vae['latent_channels']} of the latents, expected 0, 5 (inpainting), 1 (depth) or "
                              "3 (upscaling)")
        upscales = "low_resolution" in self.extra_channels
        if upscales != bool(self.unet.get("num_class_embeds")) or upscales != (self.low_res_scheduler is not None):
            raise ExportError(
                f"{self.name}: got a UNet with {extra} extra input channels, num_class_embeds="
                f"{self.unet.get('num_class_embeds')!r} and {'a' if self.low_res_scheduler else 'no'} "
                "low_res_scheduler, expected those of an upscaler or none; its folders are of different models")
        if self.prediction not in PREDICTIONS:
            raise ExportError(f"{self.name}: got prediction_type {self.prediction!r}, expected "
                              f"{', '.join(PREDICTIONS)}")
        for text in self.texts:
            if len(text.tokenizer) > text.config["vocab_size"]:
                raise ExportError(f"{self.name}: got a tokenizer of {len(text.tokenizer)} tokens for a text encoder of "
                                  f"{text.config['vocab_size']}; pass the model's own with --tokenizer DIR")

    @property
    def name(self) -> str:
        return self.checkpoint.name

    @property
    def root(self) -> Path:
        return self.checkpoint.root

    @property
    def weights(self) -> tuple[Path, ...]:
        return self.checkpoint.weights([*(text.name for text in self.texts), "unet", "vae"])

    @property
    def family(self) -> str:
        """One of TIME_IDS; "sd1" and "sd2" by their text width; "stable-diffusion" for any other of that layout."""
        if self.time_ids:
            return TIME_IDS[self.time_ids]
        return {768: "sd1", 1024: "sd2"}.get(self.unet["cross_attention_dim"], "stable-diffusion")

    @property
    def prediction(self) -> str:
        """Return one of PREDICTIONS: what the UNet predicts."""
        return str(self.scheduler.get("prediction_type", "epsilon"))

    @property
    def extra_channels(self) -> Mapping[str, int]:
        """The UNet's input channels after those of the latents: meaning → how many."""
        return EXTRA_CHANNELS[self.unet["in_channels"] - self.vae["latent_channels"]]

    @property
    def pooled_width(self) -> int:
        """Width of the pooled text that an XL UNet takes: that of its last text encoder."""
        return int(self.texts[-1].config["projection_dim"])

    @property
    def time_ids(self) -> int:
        """Numbers that an XL UNet takes beside the pooled text: what its embedding has room for; 0 for others."""
        if not self.unet.get("addition_embed_type"):
            return 0
        room = int(self.unet["projection_class_embeddings_input_dim"]) - self.pooled_width
        return room // int(self.unet["addition_time_embed_dim"])

    @property
    def latent(self) -> LatentSpec:
        """The latents, whose sizes are multiples of one halving for each UNet level but the last."""
        return LatentSpec(
            channels=self.vae["latent_channels"], scale=float(self.vae.get("scaling_factor", 0.18215)),
            shift=float(self.vae.get("shift_factor") or 0.0), factor=pixels_a_latent(self.vae),
            multiple=2 ** (len(self.unet["block_out_channels"]) - 1))

    @property
    def dims(self) -> dict[str, DimSpec]:
        """The dimensions of the graphs that follow from others."""
        return dims(self.latent.factor, self.latent.multiple)

    @property
    def max_length(self) -> int:
        """Tokens that a prompt is padded or cut to."""
        return min(n for text in self.texts
                   for n in (text.tokenizer.model_max_length, text.config["max_position_embeddings"]))

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the pictures that the model was trained on."""
        size = self.unet.get("sample_size") or 64
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.latent.factor, width * self.latent.factor

    @property
    def modules(self) -> dict[str, Callable[[], TracedModule]]:
        """Network → what loads the module that it is traced from."""
        load, latent = self.checkpoint.load, self.latent
        kinds = {"text_encoder": FirstXLTextEncoder if self.time_ids else TextEncoder,
                 "text_encoder_2": SecondXLTextEncoder}

        def text_encoder(name: str) -> TracedModule:
            return kinds[name](load(name, TEXTS[name]), self.max_length)

        return {
            **{text.name: partial(text_encoder, text.name) for text in self.texts},
            "unet": lambda: UNet(load("unet", UNet2DConditionModel), latent.channels, self.extra_channels,
                                 self.pooled_width if self.time_ids else 0, self.time_ids),
            "vae_decoder": lambda: VAEDecoder(load("vae", AutoencoderKL), latent),
            "vae_encoder": lambda: VAEEncoder(load("vae", AutoencoderKL), latent),
        }

    @property
    def tokenizers(self) -> dict[str, CLIPTokenizer]:
        """File in the bundle → the tokenizer that is saved there."""
        return {TOKENIZERS[text.name]: text.tokenizer for text in self.texts}

    def sizes(self, check: bool) -> dict[str, int]:
        return latent_sizes(self.latent, self.dims, self.max_length, check)

    def precision(self, network: str, dtype: str) -> str:
        if network not in ("vae_decoder", "vae_encoder"):
            return dtype
        return vae_precision(self.vae, dtype, wide=bool(self.time_ids or self.low_res_scheduler))

    def manifest(self, components: Mapping[str, Component], files: Mapping[str, str],
                 provenance: Mapping[str, Any]) -> Manifest:
        """Return the manifest of a bundle of these components. files: those of no component → sha256."""
        texts = tuple(
            TextSpec(text.name, TOKENIZERS[text.name], self.max_length, text.tokenizer.pad_token_id,
                     "penultimate" if self.time_ids else "last",
                     pooled="text_embeds" if text.name == "text_encoder_2" else "")
            for text in self.texts)
        told = bool(self.unet.get("num_class_embeds"))
        frames = any(component.variant == "frames" for component in components.values())
        return Manifest(
            family=self.family, tasks=tasks(self.extra_channels, self.time_ids, frames), components=components,
            conditions=conditions(self.extra_channels, told, self.time_ids),
            guidance=Guidance(negative="zeros" if self.zero_negative else "prompt"), latent=self.latent, text=texts,
            dims=self.dims, scheduler=self.scheduler, prediction_type=self.prediction,
            low_res_scheduler=self.low_res_scheduler, max_noise_level=self.max_noise_level,
            default_size=self.default_size, defaults={"strength": 0.3} if self.time_ids else {}, files=files,
            provenance=provenance)
