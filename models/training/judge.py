"""The judge stage: pictures of held-out captions, drawn with diffusers, and how many show what was asked for."""

import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from models.training.parts import SCALING_FACTOR
from models.training.pictures import to_images
from models.world.adherence import check
from models.world.layouts import held_out
from models.world.scenes import Scene

logger = logging.getLogger(__name__)


@torch.no_grad()
def generate(
    folder: Path,
    captions: list[str],
    device: torch.device,
    unet: nn.Module | None = None,
    *,
    net: nn.Module | None = None,
    hints: Tensor | None = None,
    guidance: float = 2.0,
    steps: int = 20,
    seed: int = 0,
    batch: int = 32,
) -> np.ndarray:
    """Return pictures of captions by DDIM with classifier-free guidance: uint8 [n, 64, 64, 3].

    net, hints: a ControlNet and what it reads, float [n, 3, 64, 64] in 0..1.
    """
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).to(device)
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).to(device)
    if unet is None:
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).to(device)
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    generator = torch.Generator().manual_seed(seed)
    images = []
    for i in range(0, len(captions), batch):
        texts = captions[i : i + batch]
        ids = tokenizer([""] * len(texts) + texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        z = torch.randn(len(texts), 4, 16, 16, generator=generator).to(device)
        scheduler.set_timesteps(steps)
        with torch.autocast(device.type, torch.bfloat16):
            hidden = encoder(ids.to(device)).last_hidden_state
            for t in scheduler.timesteps:
                twice, added = torch.cat([z, z]), {}
                if net is not None and hints is not None:
                    hint = hints[i : i + batch].to(device)
                    down, middle = net(twice, t, hidden, torch.cat([hint, hint]), return_dict=False)
                    added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
                both = unet(twice, t, hidden, **added).sample.float()
                without, with_text = both.chunk(2)
                z = scheduler.step(without + guidance * (with_text - without), t, z).prev_sample
            images.append(to_images(vae.decode(z / SCALING_FACTOR).sample))
    return np.concatenate(images)


def judge(folder: Path, device: torch.device) -> dict[str, float]:
    """Log the share of held-out captions whose picture passes, at the guidance that does best on others; return it."""
    tuning, final = held_out(128, seed=1), held_out(256, seed=0)
    rates: dict[float, float] = {}
    for guidance in (1.0, 1.25, 1.5, 2.0, 3.0):
        rates[guidance] = float(np.mean(passes(folder, tuning, device, guidance)))
        logger.info("judge: guidance %.2f, %.1f %% of %d pass", guidance, 100 * rates[guidance], len(tuning))
    guidance = max(rates, key=rates.__getitem__)
    passed = passes(folder, final, device, guidance)
    unseen = np.array([s.unseen for s in final])
    result = {
        "guidance": guidance,
        "all": passed.mean(),
        "seen": passed[~unseen].mean(),
        "unseen": passed[unseen].mean(),
    }
    result |= {f"{n} objects": passed[[len(s.objects) == n for s in final]].mean() for n in (1, 2, 3)}
    result = {name: round(float(value), 4) for name, value in result.items()}
    logger.info("judge: %s", result)
    return result


def passes(folder: Path, told: list[Scene], device: torch.device, guidance: float) -> np.ndarray:
    """Return for each caption whether its picture shows what it asks for, bool [n]."""
    images = generate(folder, [s.caption for s in told], device, guidance=guidance)
    return np.array([check(i, s).ok for i, s in zip(images, told, strict=True)])
