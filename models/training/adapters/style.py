"""The style stage: a LoRA (Hu et al., 2021, arXiv 2106.09685) with which a finished UNet draws red on white."""

import logging
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn
from tqdm import tqdm

from engines.bundle.publish import publish
from models.training.adapters.frozen import Frozen, batches
from models.training.fit import Worker, fit
from models.training.judge import generate
from models.training.pictures import save_grid, to_tensor
from models.world import drawing
from models.world.adherence import check
from models.world.captions import training_caption
from models.world.layouts import held_out, sample_layout
from models.world.scenes import Layout, Scene
from models.world.steering import INK, PAPER, in_style

logger = logging.getLogger(__name__)

RANK = 8
# What is painted on 16x16 latents is painted without attention in this UNet, so convolutions take part.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut")
LORA_FILE = "pytorch_lora_weights.safetensors"


def add_lora(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Give a UNet a LoRA that changes nothing yet, and freeze all else."""
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS)))
    return unet


def draw_in_style(layouts: list[Layout]) -> np.ndarray:
    """Draw layouts in INK on PAPER, whatever their colours are: uint8 [n, 64, 64, 3]."""
    one_by_one = [[Layout(Scene((replace(o, colour=INK),), (), PAPER), (r,), (c,)) for o, r, c in
                   zip(v.scene.objects, v.radii, v.centres, strict=True)] for v in layouts]
    pictures = iter(drawing.draw([one for some in one_by_one for one in some]))
    # Objects stand apart, so that of each pixel the one picture counts that differs from the paper.
    return np.stack([np.min([next(pictures) for _ in some], axis=0) for some in one_by_one])


def train_style(worker: Worker) -> None:
    """Train the LoRA; checkpoints and a grid of pictures go to the work folder."""
    args = worker.args
    frozen = Frozen(worker)
    unet = frozen.placed(add_lora(frozen.unet))
    found, latents = encode_style(frozen)
    rows = batches(worker.rng, len(found), args.batch)

    def loss(_: float) -> Tensor:
        some = next(rows)
        texts = ["" if worker.rng.random() < 0.1 else training_caption(found[i], worker.rng, 0.5) for i in some]
        noisy, noise, t = frozen.noisy(latents[some], blind := args.batch // 4)
        with worker.autocast():
            predicted = unet(noisy, t, frozen.read(texts)).sample
        return frozen.loss(predicted, noise, t, blind)

    def report(ema: nn.Module) -> None:
        told = held_out(args.report_pictures, seed=1)
        images = generate(args.model, [s.caption for s in told], worker.device, ema)
        styled = np.mean([in_style(image) for image in images])
        right = np.mean([check(image, s, colours=False).ok for image, s in zip(images, told, strict=True)])
        logger.info("style: %.1f %% are in it, %.1f %% as the caption says", 100 * styled, 100 * right)
        save_grid(images[:48], worker.work / "style.png")

    fit(worker, "style", unet, loss, lr=args.style_lr, minutes=args.style_minutes, batch=args.batch, ema_decay=0.98,
        report=report)


def encode_style(frozen: Frozen) -> tuple[list[Scene], Tensor]:
    """Return seen scenes, and scaled latents of them drawn in the style, float16 [n, 4, 16, 16]."""
    rng, chunk = Random(f"style {frozen.worker.args.seed}"), 64
    found: list[Scene] = []
    latents = []
    for _ in tqdm(range(-(-frozen.worker.args.style_scenes // chunk)), desc="latents", mininterval=10):
        layouts = [sample_layout(rng) for _ in range(chunk)]
        latents.append(frozen.encode(to_tensor(draw_in_style(layouts))))
        found += [v.scene for v in layouts]
    return found, torch.cat(latents)


def save_style(work: Path, model: Path, out: Path) -> None:
    """Write the LoRA with the averaged weights of the last checkpoint to `out` as diffusers does, fp16."""
    unet = add_lora(UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=torch.float32))
    unet.load_state_dict(torch.load(work / "style.pt", map_location="cpu")["ema"])
    tensors = {name: t.half().contiguous() for name, t in get_peft_model_state_dict(unet).items()}
    with publish(out, force=True, marker=LORA_FILE) as folder:
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=tensors)
        (folder / LORA_FILE).chmod(0o644)  # safetensors leaves it to its owner alone
