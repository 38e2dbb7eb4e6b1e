"""Tiny random checkpoints with the layout of real ones, for tests and benchmarks.

Each builder saves a diffusers folder at `path` and returns `path`. The same call gives the same weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessor,
)

from export.sources.tokenizer import BOS, EOS

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
DOWN = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
UP = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
MERGES = [("t", "h"), ("th", "e</w>"), ("a", "n"), ("an", "d</w>"), ("r", "e"), ("i", "n"), ("in", "g</w>"),
          ("c", "a"), ("ca", "t</w>"), ("o", "n</w>"), ("o", "f</w>"), ("h", "o"), ("r", "s"), ("rs", "e</w>")]


def sd1(path: str | Path, seed: int = 0, levels: int = 4, vae_levels: int = 4) -> Path:
    """Save Stable Diffusion 1.x in small: conv projections, 8 heads at every level, epsilon, PNDM as SD 1.5 ships it.

    levels, vae_levels: those of the UNet and of the VAE; pictures are multiples of 2^(vae_levels − 1) · 2^(levels − 1)
    pixels.
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, down_block_types=DOWN[-levels:],
        up_block_types=UP[:levels], block_out_channels=(32, 32, 64, 64)[:levels], norm_num_groups=8,
        cross_attention_dim=32, attention_head_dim=8)
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    return _save(path, unet, _vae(vae_levels), _text(width=32, layers=3, act="quick_gelu"), _tokenizer(pad=EOS),
                 scheduler)


def sd1_two_levels(path: str | Path) -> Path:
    """Save `sd1` with a UNet of two levels, which is exported in two thirds of the time."""
    return sd1(path, levels=2)


def sd1_one_level(path: str | Path) -> Path:
    """Save `sd1` with a UNet and a VAE of one level each, for those who compile all of it."""
    return sd1(path, levels=1, vae_levels=1)


def sd2(path: str | Path, seed: int = 1, levels: int = 2) -> Path:
    """Save Stable Diffusion 2.x in small: linear projections, head dim 64 with heads by level, v-prediction, DDIM."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, down_block_types=DOWN[-levels:],
        up_block_types=UP[:levels], block_out_channels=(64, 128, 64, 64)[:levels], norm_num_groups=8,
        cross_attention_dim=48, attention_head_dim=[1, 2, 1, 1][:levels], use_linear_projection=True)
    scheduler = DDIMScheduler(**BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False,
                              steps_offset=1)
    return _save(path, unet, _vae(), _text(width=48, layers=2, act="gelu"), _tokenizer(pad="!"), scheduler)


def _parts(base: Callable[..., Path], **options: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return DiffusionPipeline.from_pretrained(base(Path(folder) / "base", **options)).components


def _with_channels(unet: UNet2DConditionModel, extra: int, **options: Any) -> UNet2DConditionModel:
    """Return a UNet like `unet` with more input channels."""
    return UNet2DConditionModel.from_config(unet.config, in_channels=4 + extra, **options)


def inpainting(path: str | Path) -> Path:
    """Save SD 1.x with the 9-channel UNet of the inpainting models, of two levels."""
    return _inpainting(path, sd1)


def inpainting_2(path: str | Path) -> Path:
    """Save SD 2.x with the 9-channel UNet of the inpainting models, of two levels."""
    return _inpainting(path, sd2)


def _inpainting(path: str | Path, base: Callable[..., Path]) -> Path:
    torch.manual_seed(3)
    parts = _parts(base, levels=2)
    StableDiffusionInpaintPipeline(**{**parts, "unet": _with_channels(parts["unet"], 5)},
                                   requires_safety_checker=False).save_pretrained(path)
    return Path(path)


def depth(path: str | Path) -> Path:
    """Save SD 2.x with the 5-channel UNet of the depth model, and a smallest depth estimator, which nobody calls."""
    torch.manual_seed(4)
    parts = _parts(sd2)
    names = ("vae", "text_encoder", "tokenizer", "scheduler")
    estimator = DPTForDepthEstimation(DPTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, image_size=32, patch_size=16,
        backbone_out_indices=[0, 0, 1, 1], neck_hidden_sizes=[4, 4, 4, 4], fusion_hidden_size=4))
    StableDiffusionDepth2ImgPipeline(
        **{name: parts[name] for name in names}, unet=_with_channels(parts["unet"], 1), depth_estimator=estimator,
        feature_extractor=DPTImageProcessor(size={"height": 32, "width": 32})).save_pretrained(path)
    return Path(path)


def upscaler(path: str | Path) -> Path:
    """Save the x4 upscaler in small, with the text of SD 2.x.

    Its UNet has 7 channels and takes noise levels as labels, its VAE has three levels.
    """
    torch.manual_seed(5)
    parts = _parts(sd2)
    options = {"num_class_embeds": 1000, "only_cross_attention": [True, False]}
    betas = {**BETAS, "beta_start": 1e-4, "beta_end": 0.02}
    StableDiffusionUpscalePipeline(
        vae=_vae(3, scaling_factor=0.08333), text_encoder=parts["text_encoder"], tokenizer=parts["tokenizer"],
        unet=_with_channels(parts["unet"], 3, **options), low_res_scheduler=DDPMScheduler(**betas),
        scheduler=DDIMScheduler(**betas, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False,
                                steps_offset=1), max_noise_level=350).save_pretrained(path)
    return Path(path)


def refiner(path: str | Path) -> Path:
    """Save the refiner of SDXL: its second text encoder alone, and an aesthetic score for a target size."""
    torch.manual_seed(6)
    parts = _parts(sdxl)
    unet = UNet2DConditionModel.from_config(parts["unet"].config, cross_attention_dim=48,
                                            projection_class_embeddings_input_dim=48 + 5 * 8)
    names = ("vae", "text_encoder_2", "tokenizer_2", "scheduler")
    StableDiffusionXLImg2ImgPipeline(
        **{name: parts[name] for name in names}, unet=unet, text_encoder=None, tokenizer=None,
        requires_aesthetics_score=True, force_zeros_for_empty_prompt=False).save_pretrained(path)
    return Path(path)


def sdxl(path: str | Path, seed: int = 2) -> Path:
    """Save Stable Diffusion XL in small: two text encoders, pooled text and sizes, Euler, no attention at the top."""
    torch.manual_seed(seed)
    first, second = _text(width=32, layers=3, act="quick_gelu"), _text(48, 2, "gelu", CLIPTextModelWithProjection)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=32 + 48, attention_head_dim=[4, 8],
        transformer_layers_per_block=[1, 2], use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=48 + 6 * 8)
    vae = _vae(scaling_factor=0.13025, force_upcast=True)
    scheduler = EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading")
    StableDiffusionXLPipeline(
        vae=vae, text_encoder=first, text_encoder_2=second, tokenizer=_tokenizer(pad=EOS),
        tokenizer_2=_tokenizer(pad="!"), unet=unet, scheduler=scheduler).save_pretrained(path)
    return Path(path)


def control(path: str | Path, checkpoint: Path, seed: int = 3, hint: tuple[int, ...] = (8, 8, 16, 16)) -> Path:
    """Save a ControlNet for the UNet of `checkpoint`, whose weights it shares.

    Weights that training starts with as 0 are random.
    """
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(UNet2DConditionModel.from_pretrained(checkpoint / "unet"),
                                    conditioning_embedding_out_channels=hint)
    with torch.no_grad():
        for value in net.parameters():
            if not value.any():
                value.normal_(std=0.1)
    net.save_pretrained(path)
    return Path(path)


def vae(path: str | Path, seed: int, **options: Any) -> Path:
    """Save a VAE in a folder of its own."""
    torch.manual_seed(seed)
    _vae(**options).save_pretrained(path)
    return Path(path)


def _vae(levels: int = 4, **options: Any) -> AutoencoderKL:
    vae = AutoencoderKL(
        sample_size=64, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, block_out_channels=(8, 16, 16, 16)[-levels:],
        layers_per_block=1, latent_channels=4, norm_num_groups=4, **options)
    with torch.no_grad():  # a fresh decoder gives little contrast
        vae.decoder.conv_out.weight *= 2
    return vae


def _text(width: int, layers: int, act: str, model: type[nn.Module] = CLIPTextModel) -> nn.Module:
    size = len(_tokenizer(pad=EOS))
    made = model(CLIPTextConfig(
        vocab_size=size, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=4, hidden_act=act, initializer_factor=4.0, bos_token_id=size - 2, eos_token_id=size - 1,
        pad_token_id=1, projection_dim=width, max_position_embeddings=77))
    *_, norm = (module for module in made.modules() if isinstance(module, nn.LayerNorm))
    with torch.no_grad():  # a fresh one gives states whose mean is 0, which those of trained models is not
        norm.bias += 0.3
    return made


def _tokenizer(pad: str) -> CLIPTokenizer:
    """Return byte-level BPE in CLIP's order (bytes, bytes that end a word, merges, start, end): any text tokenises."""
    symbols = [chr(c) for a, b in (("!", "~"), ("¡", "¬"), ("®", "ÿ")) for c in range(ord(a), ord(b) + 1)]
    symbols += [chr(256 + n) for n in range(256 - len(symbols))]
    words = symbols + [s + "</w>" for s in symbols] + ["".join(m) for m in MERGES] + [BOS, EOS]
    return CLIPTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=MERGES, pad_token=pad,
                         model_max_length=77)


def _save(path: str | Path, unet: nn.Module, vae: nn.Module, text: nn.Module, tokenizer: CLIPTokenizer,
          scheduler: PNDMScheduler | DDIMScheduler) -> Path:
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False).save_pretrained(path)
    return Path(path)
