"""The finished model that an adapter is trained on, and what its UNet is shown at every step."""

from collections.abc import Iterator
from random import Random

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from models.training.fit import Worker
from models.training.parts import SCALING_FACTOR, build_scheduler
from models.training.text import Tokens
from models.training.unet import LevelledLoss

BLIND = 700  # the timestep down to which it is decided what is painted where


class Frozen:
    """The parts of the diffusers folder --model, none of which learns."""

    def __init__(self, worker: Worker) -> None:
        folder, self.worker = worker.args.model, worker
        self.tokens = Tokens(CLIPTokenizer.from_pretrained(folder / "tokenizer"))
        self.encoder = self.placed(CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32))
        self.vae = self.placed(AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32))
        self.unet = self.placed(UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32))
        for module in (self.encoder, self.vae, self.unet):
            module.requires_grad_(False)
        self.scheduler = build_scheduler()
        self.timesteps: int = self.scheduler.config.num_train_timesteps
        self.levelled = LevelledLoss(2 * self.timesteps, worker.device)

    def placed(self, module: nn.Module) -> nn.Module:
        """Return a module on the worker's device; on a CPU with the attention that is fastest to train there."""
        if self.worker.device.type == "cpu" and hasattr(module, "set_attn_processor"):
            module.set_attn_processor(AttnProcessor())
        return module.to(self.worker.device, memory_format=torch.channels_last)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return scaled latents, float16 [n, 4, 16, 16], of pictures, float [n, 3, 64, 64] in -1..1."""
        x = images.to(self.worker.device, memory_format=torch.channels_last)
        with self.worker.autocast():
            return (self.vae.encode(x).latent_dist.mode().float() * SCALING_FACTOR).half()

    def noisy(self, latents: Tensor, blind: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return latents amid noise, the noise, and the timesteps, int64 [n], drawn evenly.

        blind: so many rows show nothing of their latents. They are noise alone, as when a picture is begun, at
        timesteps from `BLIND` on, and what is returned for theirs is what they hold beside the latents asked for.
        """
        x = latents.to(self.worker.device).float()
        noise = torch.randn_like(x) + self.worker.args.noise_offset * torch.randn(*x.shape[:2], 1, 1, device=x.device)
        t = torch.randint(0, self.timesteps, (len(x),), device=x.device)
        t[:blind] = torch.randint(BLIND, self.timesteps, (blind,), device=x.device)
        noisy = self.scheduler.add_noise(x, noise, t)
        noisy[:blind] = torch.randn_like(x[:blind])
        kept = self.scheduler.alphas_cumprod.to(x.device)[t[:blind], None, None, None]
        noise[:blind] = (noisy[:blind] - kept.sqrt() * x[:blind]) / (1 - kept).sqrt()
        return noisy.contiguous(memory_format=torch.channels_last), noise, t

    def loss(self, predicted: Tensor, noise: Tensor, t: Tensor, blind: int = 0) -> Tensor:
        """Return the LevelledLoss of what `noisy` gave; its blind rows have bands of their own."""
        return self.levelled(predicted, noise, t + self.timesteps * (torch.arange(len(t), device=t.device) < blind))

    def read(self, captions: list[str]) -> Tensor:
        """Return what the UNet is told of captions, float [n, 32, 128]."""
        with torch.no_grad():
            return self.encoder(self.tokens(captions).to(self.worker.device)).last_hidden_state


def batches(rng: Random, n: int, batch: int) -> Iterator[list[int]]:
    """Yield batches of row numbers below `n` without end; an epoch has each at most once, and no batch is cut short."""
    while True:
        order = rng.sample(range(n), n)
        yield from (order[i : i + batch] for i in range(0, n - batch + 1, batch))
