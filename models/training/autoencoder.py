"""The vae and decoder stages: an AutoencoderKL on drawn scenes."""

import logging
import shutil
from random import Random

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from models.training.fit import Worker, fit
from models.training.parts import RAW_DEVIATION, build_vae
from models.training.pictures import draw_scenes, save_grid, to_images, to_tensor
from models.world import drawing, scenes
from models.world.adherence import check
from models.world.layouts import sample_layout

logger = logging.getLogger(__name__)


def train_vae(worker: Worker) -> None:
    args = worker.args
    vae = build_vae().to(worker.device, memory_format=torch.channels_last)

    def loss(progress: float) -> Tensor:
        x = draw_small(worker.rng, args.vae_batch)
        if progress < 0.8:  # quarters of pictures teach nearly as much for a quarter of the work
            half = scenes.IMAGE_SIZE // 2
            i, j = worker.rng.randrange(half + 1), worker.rng.randrange(half + 1)
            x = x[:, :, i : i + half, j : j + half]
        x = x.to(worker.device, memory_format=torch.channels_last)
        with worker.autocast():
            posterior = vae.encode(x).latent_dist
            out = vae.decode(posterior.sample()).sample.float()
        # Three of the four channels are led to the picture at quarter size: colours need not be discovered one axis
        # at a time, and the UNet later paints in a space that looks like what it paints.
        small = (posterior.mean[:, :3].float() - nn.functional.avg_pool2d(x, 4)).square().mean()
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        return picture_loss(out, x) + 10 * small + 1e-4 * kl

    ema = fit(
        worker,
        "vae",
        vae,
        loss,
        lr=2e-3,
        minutes=args.vae_minutes,
        batch=args.vae_batch,
        ema_decay=0.9,
        report=lambda ema: report_vae(worker, ema),
    )
    if worker.first:
        normalise_latents(ema, draw_scenes(Random("latents"), 1024)[1].to(worker.device))
        ema.to(memory_format=torch.contiguous_format).save_pretrained(worker.work / "vae")


def train_decoder(worker: Worker) -> None:
    vae = AutoencoderKL.from_pretrained(worker.work / "vae").to(worker.device, memory_format=torch.channels_last)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)

    def loss(_: float) -> Tensor:
        x = draw_small(worker.rng, worker.args.vae_batch).to(worker.device, memory_format=torch.channels_last)
        with worker.autocast():
            with torch.no_grad():
                z = vae.encode(x).latent_dist.mode()
                z = z + 0.05 * RAW_DEVIATION * torch.rand(len(z), 1, 1, 1, device=z.device) * torch.randn_like(z)
            out = vae.decode(z).sample.float()
        return picture_loss(out, x)

    ema = fit(
        worker,
        "decoder",
        vae,
        loss,
        lr=1e-3,
        minutes=worker.args.decoder_minutes,
        batch=worker.args.vae_batch,
        ema_decay=0.95,
        report=lambda ema: report_vae(worker, ema),
    )
    if worker.first:
        ema.to(memory_format=torch.contiguous_format).save_pretrained(worker.work / "vae.tmp")
        shutil.rmtree(worker.work / "vae")
        (worker.work / "vae.tmp").rename(worker.work / "vae")


def draw_small(rng: Random, n: int) -> Tensor:
    """Return pictures, float [n, 3, 64, 64] in -1..1, of the hardest of every three scenes: with most small objects."""
    trios = [[sample_layout(rng) for _ in range(3)] for _ in range(n)]
    return to_tensor(
        drawing.draw([max(t, key=lambda v: sum(o.size == "small" for o in v.scene.objects)) for t in trios])
    )


def picture_loss(out: Tensor, x: Tensor) -> Tensor:
    """Return L1 + L2 of a reconstruction; an object's pixel weighs nine times a background's."""
    foreground = (x != x[:, :, :1, :1]).any(1, keepdim=True)
    error = (out - x) * (1 + 8 * foreground)
    return error.abs().mean() + error.square().mean()


@torch.no_grad()
def report_vae(worker: Worker, vae: nn.Module) -> None:
    """Log how many of 256 drawn pictures pass the judge after a reconstruction, a third of them with unseen pairs."""
    rng = Random("vae report")
    layouts = [sample_layout(rng, unseen=i % 3 == 0) for i in range(256)]
    images = drawing.draw(layouts)
    x = to_tensor(images).to(worker.device)
    with worker.autocast():
        out = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in x.split(32)])
    passed = np.mean([check(i, v.scene).ok for i, v in zip(to_images(out), layouts, strict=True)])
    logger.info("vae: %.1f %% of reconstructions pass, L1 %.4f", 100 * passed, (out.float() - x).abs().mean())
    save_grid(np.concatenate([images[:16], to_images(out[:16])]), worker.work / "vae.png")


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, x: Tensor) -> None:
    """Fold a shift and a scale of every latent channel into the 1x1 convolutions on both sides of the latents."""
    z = torch.cat([vae.encode(part).latent_dist.mode() for part in x.split(64)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    gain = RAW_DEVIATION / std
    into, out = vae.quant_conv, vae.post_quant_conv
    into.weight[:4] *= gain[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - mean) * gain
    into.bias[4:] += 2 * gain.log()
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight /= gain[None, :, None, None]
