"""The unet stage: a UNet2DConditionModel on latents encoded once and captions worded anew every time."""

import logging
from collections.abc import Iterator
from random import Random

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from models.training.fit import Worker, fit
from models.training.folder import first_unet, save
from models.training.judge import generate
from models.training.parts import SCALING_FACTOR, build_scheduler
from models.training.pictures import draw_scenes, save_grid
from models.training.text import Tokens
from models.world.adherence import check
from models.world.captions import training_caption
from models.world.layouts import held_out
from models.world.scenes import Scene

logger = logging.getLogger(__name__)

READING, LIFTED = 0.06, 0.14  # shares of the stage: until the first the input is blank, after the second noise is full
DETAILS = slice(100, 700)  # the timesteps at which shapes are decided, drawn more often than the others


@torch.no_grad()
def encode_latents(worker: Worker) -> tuple[list[Scene], Tensor]:
    """Return this worker's share of the training scenes and their latents, float16 [n, 4, 16, 16], scaled."""
    vae = AutoencoderKL.from_pretrained(worker.work / "vae").to(worker.device, memory_format=torch.channels_last)
    rng = Random(f"latents {worker.rank}")
    found: list[Scene] = []
    latents = []
    chunk = 64
    count = -(-worker.args.scenes // (worker.args.workers * chunk))
    for _ in tqdm(range(count), desc="latents", disable=None if worker.first else True, mininterval=10):
        layouts, x = draw_scenes(rng, chunk)
        with worker.autocast():
            z = vae.encode(x.to(worker.device, memory_format=torch.channels_last)).latent_dist.mode()
        latents.append((z.float() * SCALING_FACTOR).half())
        found += [v.scene for v in layouts]
    return found, torch.cat(latents)


class LevelledLoss:
    """Squared error of the noise, each sample divided by the running mean of its band of timesteps.

    At high noise the caption decides what is painted, and the noise is nearly all of the input: the error there is a
    hundredth of that at low noise, and so would be its say. Divided by its mean every band has the same, which is
    minimising the mean logarithm of the bands' losses (arXiv:1705.07115, used for diffusion in arXiv:2312.02696).
    """

    BANDS = 20

    def __init__(self, timesteps: int, device: torch.device) -> None:
        self.timesteps = timesteps
        self.levels = torch.ones(self.BANDS, device=device)

    def __call__(self, predicted: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the mean loss of a batch, of the size of the mean error.

        predicted, noise: float [n, C, h, w]. t: int64 [n].
        """
        errors = (predicted.float() - noise).square().mean((1, 2, 3))
        band = t * self.BANDS // self.timesteps
        weights = self.levels.mean() / self.levels[band]
        count = torch.bincount(band, minlength=self.BANDS)
        total = torch.zeros_like(self.levels).index_add_(0, band, errors.detach())
        keep = 0.99**count
        self.levels = torch.where(count > 0, keep * self.levels + (1 - keep) * total / count.clamp(min=1), self.levels)
        return (weights * errors).mean()


def train_unet(worker: Worker) -> None:
    args = worker.args
    tokenizer = CLIPTokenizer.from_pretrained(worker.work / "tokenizer")
    tokens = Tokens(tokenizer)
    encoder = CLIPTextModel.from_pretrained(worker.work / "text_encoder").to(worker.device).requires_grad_(False)
    scheduler = build_scheduler()
    timesteps = scheduler.config.num_train_timesteps
    odds = torch.full((timesteps,), 0.4)
    odds[DETAILS] = 1
    levelled = LevelledLoss(timesteps, worker.device)
    unet = first_unet(args.start).to(worker.device, memory_format=torch.channels_last)
    if worker.device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # a quarter faster to train here than torch's fused attention
    found, latents = encode_latents(worker)
    epoch: Iterator[int] = iter(())

    def loss(progress: float) -> Tensor:
        nonlocal epoch
        rows = [i for _, i in zip(range(args.batch), epoch, strict=False)]
        if len(rows) < args.batch:
            epoch = iter(worker.rng.sample(range(len(found)), len(found)))
            rows = [next(epoch) for _ in range(args.batch)]
        # First captions that leave nothing open, on a blank input: what remains of the loss is reading. Then the noise
        # rises, and once it is full all timesteps take part. A model to go on from has done that.
        lift = 1.0 if args.start else min(max((progress - READING) / (LIFTED - READING), 0.0), 1.0)
        full = lift == 1.0
        open_share = 0.5 if full else 0.0
        texts = [
            "" if full and worker.rng.random() < 0.1 else training_caption(found[i], worker.rng, open_share)
            for i in rows
        ]
        x = latents[rows].to(worker.device).float()
        noise = torch.randn_like(x) + args.noise_offset * torch.randn(*x.shape[:2], 1, 1, device=x.device)
        lowest = 0 if full else 800
        t = lowest + torch.multinomial(odds[lowest:], args.batch, replacement=True).to(worker.device)
        amplitude = 1.0 if full else lift * torch.rand(args.batch, 1, 1, 1, device=x.device)
        noisy = scheduler.add_noise(x, noise, t)
        target = noise - (1 - amplitude) * noisy
        noisy = (amplitude * noisy).contiguous(memory_format=torch.channels_last)
        with worker.autocast():
            with torch.no_grad():
                hidden = encoder(tokens(texts).to(worker.device)).last_hidden_state
            predicted = unet(noisy, t, hidden).sample
        return levelled(predicted, target, t)

    def report(ema: nn.Module) -> None:
        save(worker.work, worker.work / "latest", ema)
        told = held_out(args.report_pictures, seed=1)
        images = generate(worker.work / "latest", [s.caption for s in told], worker.device, ema)
        passed = [check(i, s).ok for i, s in zip(images, told, strict=True)]
        counts = {n: [p for p, s in zip(passed, told, strict=True) if len(s.objects) == n] for n in (1, 2, 3)}
        by_count = {n: f"{sum(p)}/{len(p)}" for n, p in counts.items()}
        logger.info("unet: %.1f %% pass; %s", 100 * np.mean(passed), by_count)
        save_grid(images[:48], worker.work / "unet.png")

    fit(
        worker,
        "unet",
        unet,
        loss,
        lr=args.lr,
        minutes=args.unet_minutes,
        batch=args.batch,
        ema_decay=0.98,
        muon=True,
        report=report,
    )
