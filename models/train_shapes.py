"""Train the `shapes` model: tokenizer, autoencoder, text encoder and UNet, from drawings to a diffusers folder.

Six stages, those that train each resumable from a checkpoint in the work folder:

    vae      AutoencoderKL on drawn scenes; latents are shifted and scaled to one deviation in its 1x1 convolutions
    decoder  the autoencoder's decoder alone, from slightly noisy latents, on whole pictures; can run at any later time
    text     CLIPTextModel under throw-away heads that must read the scene off the caption's tokens; frozen afterwards
    unet     UNet2DConditionModel, epsilon prediction, on latents encoded once and captions worded anew every time
    save     the four parts, the UNet with averaged weights, as fp16 safetensors under --out
    judge    tune the guidance on held-out captions, then count on others how many pictures show what is asked for

The UNet's timesteps are drawn in proportion to the weight that min-SNR-5 gives them (arXiv:2303.09556), which leaves
the loss itself unweighted. On a CPU every worker is a process of one thread that trains on its own and averages its
weights with the others every few steps (local SGD, arXiv:1805.09767): faster than one process of many threads, and it
keeps its pace when something else runs on the machine.
"""

import argparse
import copy
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.adherence import check
from models import scenes
from models.scenes import BACKGROUNDS, COLOURS, MAX_OBJECTS, RADII, RELATIONS, SHAPES, Layout, Scene

log = logging.getLogger("train_shapes")

TOKENS = 32
STAGES = ("vae", "decoder", "text", "unet", "save", "judge")
AVERAGE_EVERY = 8  # steps between two averagings of the workers' weights
RAW_DEVIATION = 5.5  # of the autoencoder's latents, about that of Stable Diffusion's
# What the UNet sees deviates by a half, not by one. These latents are few and high in contrast: at unit deviation
# objects and background show through the last timestep's noise, and the UNet reads them there, not in the caption.
LATENT_DEVIATION = 0.5
SCALING_FACTOR = LATENT_DEVIATION / RAW_DEVIATION


# --- the four parts


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write a byte-level BPE vocabulary in which every word of the scenes is one token, and load it."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    words = [[*word[:-1], word[-1] + "</w>"] for word in scenes.WORDS]
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
    return UNet2DConditionModel(
        sample_size=scenes.IMAGE_SIZE // 4,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


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


# --- the loop every stage shares


class Worker:
    """One of the processes that train together: its rank, its randomness and its device."""

    def __init__(self, rank: int, args: argparse.Namespace) -> None:
        self.rank, self.args, self.work = rank, args, Path(args.work)
        self.device = torch.device(args.device)
        self.rng = Random(f"{args.seed} {rank}")
        torch.manual_seed(args.seed * 1000 + rank)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    def average(self, tensors: list[Tensor], progress: float) -> float:
        """Replace tensors by their mean over all workers, and return the mean progress, the same on each of them."""
        if self.args.workers == 1:
            return progress
        flat = torch.cat([t.reshape(-1) for t in tensors] + [torch.tensor([progress], device=self.device)])
        dist.all_reduce(flat)
        flat /= self.args.workers
        parts = flat[:-1].split([t.numel() for t in tensors])
        torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])
        return float(flat[-1])


def fit(
    worker: Worker,
    name: str,
    module: nn.Module,
    loss: Callable[[float], Tensor],
    *,
    lr: float,
    minutes: float,
    batch: int,
    ema_decay: float = 0.0,
    report: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Minimise `loss` over a stage's minutes; go on from its checkpoint if there is one.

    Args:
        loss: draws a batch and returns its mean loss; told how much of the stage is done, 0 to 1.
        ema_decay: of the averaged weights, per averaging of the workers; 0 returns the last weights.
        report: called with the averaged weights by the first worker every --report-minutes.

    Returns:
        The module with its averaged weights.
    """
    path = worker.work / f"{name}.pt"
    state = {"progress": 0.0, "seconds": 0.0, "samples": 0}
    params = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = copy.deepcopy(module).requires_grad_(False)
    ema_params = [e for e, p in zip(ema.parameters(), module.parameters(), strict=True) if p.requires_grad]
    if path.exists():
        saved = torch.load(path, map_location=worker.device)
        module.load_state_dict(saved["module"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
    step = averaged = 0
    base, start, reported = state["seconds"], time.monotonic(), time.monotonic()
    state["progress"] = base / (60 * minutes)
    bar = tqdm(total=100, desc=name, unit="%", disable=None if worker.first else True, mininterval=10)
    running: list[float] = []
    while state["progress"] < 1:
        decay = 0.5 * (1 + math.cos(math.pi * state["progress"]))
        for group in optimizer.param_groups:
            group["lr"] = lr * (0.02 + 0.98 * decay) * min(1.0, (step + 1) / 200)
        value = loss(state["progress"])
        value.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running.append(float(value.detach()))
        step += 1
        if step % AVERAGE_EVERY:
            continue

        state["seconds"] = base + time.monotonic() - start
        state["progress"] = worker.average([p.data for p in params], state["seconds"] / (60 * minutes))
        state["samples"] += AVERAGE_EVERY * batch * worker.args.workers
        averaged += 1
        keep = min(ema_decay, averaged / (averaged + 10)) if ema_decay else 0.0
        torch._foreach_lerp_(ema_params, [p.data for p in params], 1 - keep)
        bar.n = int(100 * state["progress"])
        bar.set_postfix(loss=np.mean(running[-200:]), samples=state["samples"])
        if worker.first and (time.monotonic() - reported > 60 * worker.args.report_minutes or state["progress"] >= 1):
            rate = state["samples"] / state["seconds"]
            loss_now = np.mean(running[-200:])
            log.info(
                "%s: %d samples, %.0f/s, %.1f min, loss %.5f",
                name,
                state["samples"],
                rate,
                state["seconds"] / 60,
                loss_now,
            )
            saved = {"module": module.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(saved | {"state": state}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
            if report is not None:
                report(ema)
            reported = time.monotonic()
    bar.close()
    return ema


def draw_scenes(rng: Random, n: int) -> tuple[list[Layout], Tensor]:
    """`n` seen scenes and their pictures, float [n, 3, 64, 64] in -1..1."""
    layouts = [scenes.sample_layout(rng) for _ in range(n)]
    return layouts, to_tensor(scenes.draw(layouts))


def to_tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(x: Tensor) -> np.ndarray:
    """uint8 [n, 64, 64, 3] of float [n, 3, 64, 64] in -1..1."""
    return ((x.float().cpu() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


# --- vae


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
    """Pictures, float [n, 3, 64, 64] in -1..1: of every three scenes the one with most small objects, the hard ones."""
    trios = [[scenes.sample_layout(rng) for _ in range(3)] for _ in range(n)]
    return to_tensor(
        scenes.draw([max(t, key=lambda v: sum(o.size == "small" for o in v.scene.objects)) for t in trios])
    )


def picture_loss(out: Tensor, x: Tensor) -> Tensor:
    """L1 + L2 of a reconstruction; an object's pixel weighs nine times a background's."""
    foreground = (x != x[:, :, :1, :1]).any(1, keepdim=True)
    error = (out - x) * (1 + 8 * foreground)
    return error.abs().mean() + error.square().mean()


@torch.no_grad()
def report_vae(worker: Worker, vae: nn.Module) -> None:
    """Log how many of 256 drawn pictures pass the judge after a reconstruction, a third of them with unseen pairs."""
    rng = Random("vae report")
    layouts = [scenes.sample_layout(rng, unseen=i % 3 == 0) for i in range(256)]
    images = scenes.draw(layouts)
    x = to_tensor(images).to(worker.device)
    with worker.autocast():
        out = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in x.split(32)])
    passed = np.mean([check(i, v.scene).ok for i, v in zip(to_images(out), layouts, strict=True)])
    log.info("vae: %.1f %% of reconstructions pass, L1 %.4f", 100 * passed, (out.float() - x).abs().mean())
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


# --- text


class Tokens:
    """Captions to token ids, by dictionary: each of the scenes' words is one token."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.ids = {w: tokenizer.convert_tokens_to_ids(w + "</w>") for w in scenes.WORDS}

    def __call__(self, captions: list[str]) -> Tensor:
        """int64 [n, 32]."""
        rows = np.full((len(captions), TOKENS), self.eos, np.int64)
        rows[:, 0] = self.bos
        for row, text in zip(rows, captions, strict=True):
            ids = [self.ids[w] for w in text.replace(",", " ,").split()]
            row[1 : len(ids) + 1] = ids
        return torch.from_numpy(rows)


class ReadingHeads(nn.Module):
    """A text encoder with heads that must name the scene: each object at its noun, all of it at the end token."""

    OBJECT = (len(SHAPES), len(COLOURS), len(RADII) + 1, len(RELATIONS) + 1)
    SLOT = tuple(n + 1 for n in OBJECT)  # one more: there is no such object

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder
        width = encoder.config.hidden_size
        self.noun = nn.Linear(width, sum(self.OBJECT))
        self.end = nn.Linear(width, MAX_OBJECTS * sum(self.SLOT) + len(BACKGROUNDS) + 1)

    def forward(self, ids: Tensor, told: list[Scene], noun_ids: Tensor) -> Tensor:
        hidden = self.encoder(ids).last_hidden_state
        slots, backgrounds = scene_labels(told)
        end = (ids == ids[0, -1]).int().argmax(1).to(ids.device)
        losses = []
        for position in (end, torch.full_like(end, TOKENS - 1)):
            logits = self.end(hidden[torch.arange(len(ids)), position])
            parts = logits.split([*self.SLOT * MAX_OBJECTS, len(BACKGROUNDS) + 1], 1)
            labels = [*slots.flatten(1).T, backgrounds]
            losses += [nn.functional.cross_entropy(p, t.to(p.device)) for p, t in zip(parts, labels, strict=True)]
        # A noun said again ("and the red circle is ...") names an object already read: take the first ones.
        nouns = torch.isin(ids, noun_ids.to(ids.device))
        order = nouns.cumsum(1) * nouns
        repeated = torch.tensor(["and the" in s.caption for s in told], device=ids.device)
        for i in range(MAX_OBJECTS):
            nth = torch.where(repeated & (i == 2), 4, i + 1)
            row, column = (order == nth[:, None]).nonzero(as_tuple=True)
            if len(row) == 0:
                continue
            parts = self.noun(hidden[row, column]).split(list(self.OBJECT), 1)
            labels = slots[row.cpu(), i].T.to(ids.device)
            losses += [nn.functional.cross_entropy(p, t) for p, t in zip(parts, labels, strict=True)]
        return torch.stack(losses).mean()


def scene_labels(told: list[Scene]) -> tuple[Tensor, Tensor]:
    """Class indices [n, object, (shape, colour, size, relation to the one before)], absent last; background [n]."""
    sizes, relations, grounds = (*RADII, None), (*RELATIONS, None), (*BACKGROUNDS, None)
    slots = torch.tensor([ReadingHeads.OBJECT] * MAX_OBJECTS).repeat(len(told), 1, 1)
    shapes, colours = list(SHAPES), list(COLOURS)
    for n, scene in enumerate(told):
        for i, (o, r) in enumerate(zip(scene.objects, (None, *scene.relations), strict=True)):
            labels = shapes.index(o.shape), colours.index(o.colour), sizes.index(o.size), relations.index(r)
            slots[n, i] = torch.tensor(labels)
    return slots, torch.tensor([grounds.index(s.background) for s in told])


def train_text(worker: Worker) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(worker.work / "tokenizer")
    tokens = Tokens(tokenizer)
    noun_ids = torch.tensor([tokens.ids[s] for s in SHAPES])
    heads = ReadingHeads(build_text_encoder(tokenizer)).to(worker.device)

    def sample(n: int) -> list[Scene]:
        told: list[Scene] = []
        while len(told) < n:
            scene = scenes.describe(scenes.sample_layout(worker.rng).scene, worker.rng)
            if not scene.held_out:
                told.append(scene)
        return told

    def loss(_: float) -> Tensor:
        told = sample(worker.args.text_batch)
        with worker.autocast():
            return heads(tokens([s.caption for s in told]).to(worker.device), told, noun_ids)

    def report(ema: nn.Module) -> None:
        with torch.no_grad():
            for name, told in (("held-out", scenes.held_out(256, seed=1)), ("training", sample(256))):
                value = ema(tokens([s.caption for s in told]).to(worker.device), told, noun_ids)
                log.info("text: loss on %s captions %.5f", name, value)

    ema = fit(
        worker,
        "text",
        heads,
        loss,
        lr=1e-3,
        minutes=worker.args.text_minutes,
        batch=worker.args.text_batch,
        ema_decay=0.9,
        report=report,
    )
    if worker.first:
        ema.encoder.save_pretrained(worker.work / "text_encoder")


# --- unet


@torch.no_grad()
def encode_latents(worker: Worker) -> tuple[list[Scene], Tensor]:
    """This worker's share of the training scenes and their latents, float16 [n, 4, 16, 16], scaled."""
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


def timestep_weights(scheduler: DDIMScheduler) -> Tensor:
    """The min-SNR-5 weight of every timestep for epsilon prediction, at least a twentieth, tilted towards high noise.

    High noise is where the caption is needed: later the picture itself says what is in it.
    """
    alpha = scheduler.alphas_cumprod
    snr = LATENT_DEVIATION**2 * alpha / (1 - alpha)
    return (snr.clamp(max=5) / snr).clamp(min=0.05) * torch.linspace(0.4, 1.6, len(alpha))


def train_unet(worker: Worker) -> None:
    args = worker.args
    tokenizer = CLIPTokenizer.from_pretrained(worker.work / "tokenizer")
    tokens = Tokens(tokenizer)
    encoder = CLIPTextModel.from_pretrained(worker.work / "text_encoder").to(worker.device).requires_grad_(False)
    scheduler = build_scheduler()
    weights = timestep_weights(scheduler)
    unet = first_unet(args.start).to(worker.device, memory_format=torch.channels_last)
    if worker.device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # a quarter faster to train here than torch's fused attention
    unet.compile(dynamic=False)
    found, latents = encode_latents(worker)
    epoch: Iterator[int] = iter(())

    def loss(_: float) -> Tensor:
        nonlocal epoch
        rows = [i for _, i in zip(range(args.batch), epoch, strict=False)]
        if len(rows) < args.batch:
            epoch = iter(worker.rng.sample(range(len(found)), len(found)))
            rows = [next(epoch) for _ in range(args.batch)]
        texts = ["" if worker.rng.random() < 0.1 else scenes.training_caption(found[i], worker.rng) for i in rows]
        x = latents[rows].to(worker.device).float()
        noise = torch.randn_like(x) + args.noise_offset * torch.randn(*x.shape[:2], 1, 1, device=x.device)
        t = torch.multinomial(weights, args.batch, replacement=True).to(worker.device)
        noisy = scheduler.add_noise(x, noise, t).contiguous(memory_format=torch.channels_last)
        with worker.autocast():
            with torch.no_grad():
                hidden = encoder(tokens(texts).to(worker.device)).last_hidden_state
            predicted = unet(noisy, t, hidden).sample
        return nn.functional.mse_loss(predicted.float(), noise)

    def report(ema: nn.Module) -> None:
        save(worker.work, worker.work / "latest", ema)
        told = scenes.held_out(args.report_pictures, seed=1)
        images = generate(worker.work / "latest", [s.caption for s in told], worker.device, ema)
        passed = [check(i, s).ok for i, s in zip(images, told, strict=True)]
        counts = {n: [p for p, s in zip(passed, told, strict=True) if len(s.objects) == n] for n in (1, 2, 3)}
        log.info("unet: %.1f %% pass; %s", 100 * np.mean(passed), {n: f"{sum(p)}/{len(p)}" for n, p in counts.items()})
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
        report=report,
    )


def first_unet(start: str | None) -> UNet2DConditionModel:
    """A new UNet, or that of an earlier model to go on from."""
    if start is None:
        return build_unet()
    return UNet2DConditionModel.from_pretrained(start, subfolder="unet", torch_dtype=torch.float32)


def trained_unet(work: Path) -> UNet2DConditionModel:
    """The averaged weights of the last checkpoint; training need not have come to its end."""
    unet = build_unet()
    unet.load_state_dict(torch.load(work / "unet.pt", map_location="cpu")["ema"])
    return unet


@torch.no_grad()
def generate(
    folder: Path,
    captions: list[str],
    device: torch.device,
    unet: nn.Module | None = None,
    *,
    guidance: float = 4.0,
    steps: int = 20,
    seed: int = 0,
    batch: int = 32,
) -> np.ndarray:
    """Pictures of captions by DDIM with classifier-free guidance: uint8 [n, 64, 64, 3]."""
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
                both = unet(torch.cat([z, z]), t, hidden).sample.float()
                without, with_text = both.chunk(2)
                z = scheduler.step(without + guidance * (with_text - without), t, z).prev_sample
            images.append(to_images(vae.decode(z / SCALING_FACTOR).sample))
    return np.concatenate(images)


def save_grid(images: np.ndarray, path: Path, columns: int = 8) -> None:
    rows = len(images) // columns
    grid = images[: rows * columns].reshape(rows, columns, *images.shape[1:]).transpose(0, 2, 1, 3, 4)
    picture = Image.fromarray(grid.reshape(rows * images.shape[1], columns * images.shape[2], 3))
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path)


# --- save


def save(work: Path, out: Path, unet: nn.Module) -> None:
    """Write the diffusers folder, fp16, under a temporary name and then rename it."""
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(work / "tokenizer", temporary / "tokenizer")
    AutoencoderKL.from_pretrained(work / "vae").half().save_pretrained(temporary / "vae")
    config = json.loads((temporary / "vae" / "config.json").read_text())
    config.pop("_name_or_path", None)  # where this machine kept it is nobody's business
    (temporary / "vae" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_text_encoder(work / "text_encoder", temporary / "text_encoder")
    half = copy.deepcopy(unet).to("cpu", torch.float16, memory_format=torch.contiguous_format)
    half.save_pretrained(temporary / "unet")
    build_scheduler().save_pretrained(temporary / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": half.config["_diffusers_version"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    temporary.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def save_text_encoder(source: Path, out: Path) -> None:
    """Copy a text encoder as fp16, with tensors named and typed as every reader of Stable Diffusion expects them."""
    encoder = CLIPTextModel.from_pretrained(source).half()
    encoder.save_pretrained(out)
    # transformers 5 leaves out the prefix that its predecessors and every published checkpoint have.
    tensors = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in encoder.state_dict().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    # transformers loads the config's dtype, diffusers float32; a pipeline loaded without a dtype needs both alike.
    config = json.loads((out / "config.json").read_text()) | {"dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def publish_untrained(work: Path, start: str | None) -> None:
    """Give the parts that are not trained yet random weights, so that the folder can be written in its final layout.

    With `start`, the parts that the work folder lacks are those of that earlier model instead.
    """
    tokenizer = build_tokenizer(work / "tokenizer")
    if start is not None:
        for name in ("vae", "text_encoder"):
            if not (work / name).exists():
                shutil.copytree(Path(start) / name, work / name)
    if not (work / "vae").exists():
        build_vae().save_pretrained(work / "vae")
    if not (work / "text_encoder").exists():
        build_text_encoder(tokenizer).save_pretrained(work / "text_encoder")
    if not (work / "latest").exists():
        save(work, work / "latest", first_unet(start))


# --- judge


def judge(folder: Path, device: torch.device) -> dict[str, float]:
    """Log the share of held-out captions whose picture passes, at the guidance that does best on others; return it."""
    tuning, final = scenes.held_out(128, seed=1), scenes.held_out(256, seed=0)
    rates: dict[float, float] = {}
    for guidance in (1.5, 2.0, 3.0, 4.0, 5.0, 7.0):
        rates[guidance] = float(np.mean(passes(folder, tuning, device, guidance)))
        log.info("judge: guidance %.1f, %.1f %% of %d pass", guidance, 100 * rates[guidance], len(tuning))
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
    log.info("judge: %s", result)
    return result


def passes(folder: Path, told: list[Scene], device: torch.device, guidance: float) -> np.ndarray:
    images = generate(folder, [s.caption for s in told], device, guidance=guidance)
    return np.array([check(i, s).ok for i, s in zip(images, told, strict=True)])


# --- command line


def start_log() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")


def run(rank: int, stage: str, args: argparse.Namespace) -> None:
    start_log()
    if args.device == "cpu":
        torch.set_num_threads(1)
    if args.workers > 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ["MASTER_PORT"] = str(args.port)
        dist.init_process_group("gloo", rank=rank, world_size=args.workers)
    worker = Worker(rank, args)
    {"vae": train_vae, "decoder": train_decoder, "text": train_text, "unet": train_unet}[stage](worker)
    if args.workers > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m models.train_shapes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m models.train_shapes --work /tmp/shapes --out models/shapes
  python -m models.train_shapes --work /tmp/shapes --stages unet save --unet-minutes 120   train the UNet on for longer
  python -m models.train_shapes --work /tmp/more --start models/shapes --stages unet save judge   in another folder
  python -m models.train_shapes --work /tmp/shapes --device cuda --workers 1 --batch 256""",
    )
    parser.add_argument(
        "--work", required=True, help="folder for checkpoints, picture grids and `latest`, the model so far"
    )
    parser.add_argument("--out", default="models/shapes", help="where the finished model goes (default: %(default)s)")
    parser.add_argument("--start", metavar="FOLDER", help="go on from an earlier model instead of from nothing")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=STAGES, help="which stages to run (default: all)"
    )
    parser.add_argument("--vae-minutes", type=float, default=20, help="time for the autoencoder (default: %(default)s)")
    parser.add_argument(
        "--decoder-minutes", type=float, default=6, help="time for the decoder alone (default: %(default)s)"
    )
    parser.add_argument(
        "--text-minutes", type=float, default=4, help="time for the text encoder (default: %(default)s)"
    )
    parser.add_argument(
        "--unet-minutes", type=float, default=90, help="time for the UNet, earlier runs included (default: %(default)s)"
    )
    parser.add_argument(
        "--scenes", type=int, default=100_000, help="training scenes encoded for the UNet (default: %(default)s)"
    )
    parser.add_argument("--vae-batch", type=int, default=16, help="pictures per step and worker (default: %(default)s)")
    parser.add_argument(
        "--text-batch", type=int, default=64, help="captions per step and worker (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=32, help="latents per UNet step and worker (default: %(default)s)")
    parser.add_argument(
        "--noise-offset",
        type=float,
        default=0.3,
        help="deviation of a constant added to the noise of each channel, so that the mean of a picture cannot be read "
        "through the noise of the last timestep (default: %(default)s)",
    )
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of the UNet (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--report-minutes", type=float, default=8, help="between two checkpoints (default: %(default)s)"
    )
    parser.add_argument(
        "--report-pictures", type=int, default=64, help="held-out captions judged each time (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=int, default=29517, help="local port on which workers meet (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    args = parser.parse_args()
    if args.device != "cpu" and args.workers != 1:
        parser.error(f"got --workers {args.workers} with --device {args.device}; one device trains with --workers 1")
    start_log()
    work = Path(args.work)
    publish_untrained(work, args.start)
    for stage in STAGES:
        if stage not in args.stages:
            continue
        if stage == "save":
            save(work, Path(args.out), trained_unet(work))
        elif stage == "judge":
            judge(Path(args.out), torch.device(args.device))
        elif args.workers == 1:
            run(0, stage, args)
        else:
            torch.multiprocessing.spawn(run, (stage, args), args.workers)


if __name__ == "__main__":
    main()
