"""The five parts of the shapes model before training: tokenizer, autoencoder, text encoder, UNet and scheduler."""

import json
from itertools import pairwise
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from models.training.start import start_as_copy, start_with_positions
from models.world import scenes
from models.world.captions import WORDS

TOKENS = 32
RAW_DEVIATION = 5.5  # of the autoencoder's latents, about that of Stable Diffusion's
# What the UNet sees deviates by a half, not by one. These latents are few and high in contrast: at unit deviation
# objects and background show through the last timestep's noise, and the UNet reads them there, not in the caption.
LATENT_DEVIATION = 0.5
SCALING_FACTOR = LATENT_DEVIATION / RAW_DEVIATION


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write a byte-level BPE vocabulary in which every word of the scenes is one token, and load it."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    words = [[*word[:-1], word[-1] + "</w>"] for word in WORDS]
    while any(len(w) > 1 for w in words):
        pairs = [p for w in words for p in pairwise(w)]
        best = max(sorted(set(pairs)), key=pairs.count)
        merges.append(best)
        words = [_merge(w, best) for w in words]
    vocab = [
        *letters,
        *(c + "</w>" for c in letters),
        *("".join(m) for m in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    (folder / "vocab.json").write_text(json.dumps({v: i for i, v in enumerate(vocab)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    special = {"bos_token": "<|startoftext|>"} | dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    config = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": True}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for symbol in word:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def build_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=scenes.IMAGE_SIZE,
        scaling_factor=SCALING_FACTOR,
    )
    # Start with a deviation of 0.05: at 1 the noise drowns the latents, and colours take far longer to get through.
    nn.init.constant_(vae.quant_conv.bias[4:], -6.0)
    return vae


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=scenes.IMAGE_SIZE // 4,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=(2, 3, 4),  # diffusers reads this as the numbers of heads
        norm_num_groups=8,
    )
    start_as_copy(unet)
    start_with_positions(unet)
    return unet


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
        timestep_spacing="leading",
    )
