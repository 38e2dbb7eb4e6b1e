"""The edges stage: a ControlNet for a finished UNet, which draws along the edges of a picture."""

import logging
from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm

from engines.bundle.publish import publish
from models.training.adapters.frozen import Frozen, batches
from models.training.fit import Worker, fit
from models.training.judge import generate
from models.training.pictures import save_grid, to_tensor
from models.world import drawing
from models.world.layouts import sample_layout
from models.world.placed import edges, held_out, scatter, training_caption
from models.world.scenes import Scene
from models.world.steering import in_place, overlap

logger = logging.getLogger(__name__)


def build_net(unet: UNet2DConditionModel) -> ControlNetModel:
    """Return a ControlNet that starts as a copy of the UNet's way down and middle, with zeros for all that it adds.

    Three levels for the hint, 64x64 to 16x16. The middle is one residual block, 0.3 M weights instead of 1.0: on 4x4
    cells there is little of an edge to see.
    """
    config = {key: unet.config[key] for key in (
        "in_channels", "block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim",
        "attention_head_dim", "norm_num_groups", "flip_sin_to_cos", "freq_shift", "act_fn")}
    net = ControlNetModel(**config, mid_block_type="UNetMidBlock2D", conditioning_embedding_out_channels=(16, 32, 48))
    for name in ("conv_in", "time_proj", "time_embedding", "down_blocks"):
        getattr(net, name).load_state_dict(getattr(unet, name).state_dict())
    net.mid_block.resnets[0].load_state_dict(unet.mid_block.resnets[0].state_dict())
    return net


def to_hints(found: np.ndarray) -> Tensor:
    """Return edges as a ControlNet reads them: float [n, 3, 64, 64] in 0..1."""
    return torch.from_numpy(found).float().div(255)[:, None].expand(-1, 3, -1, -1)


def train_edges(worker: Worker) -> None:
    """Train the ControlNet; checkpoints and a grid of pictures go to the work folder."""
    args = worker.args
    frozen = Frozen(worker)
    net = frozen.placed(build_net(frozen.unet))
    found, latents, hints = encode_scenes(frozen)
    rows = batches(worker.rng, len(found), args.batch)

    def loss(_: float) -> Tensor:
        some = next(rows)
        # Where the hint has an object, its colour shows through the noise even of the last timestep, and is read there
        # instead of in the caption. Half of the rows show noise alone.
        blind = args.batch // 2
        noisy, noise, t = frozen.noisy(latents[some], blind)
        hint = to_hints(hints[some]).to(worker.device).contiguous(memory_format=torch.channels_last)
        with worker.autocast():
            hidden = frozen.read([training_caption(found[i], worker.rng) for i in some])
            down, middle = net(noisy, t, hidden, hint, return_dict=False)
            predicted = frozen.unet(noisy, t, hidden, down_block_additional_residuals=down,
                                    mid_block_additional_residual=middle).sample
        return frozen.loss(predicted, noise, t, blind)

    def report(ema: nn.Module) -> None:
        asked = held_out(args.report_pictures, seed=1)
        drawn = drawing.draw([layout for layout, _ in asked])
        images = generate(args.model, [told.caption for _, told in asked], worker.device, frozen.unet, net=ema,
                          hints=to_hints(edges(drawn)))
        placed = np.mean([in_place(image, *one) for image, one in zip(images, asked, strict=True)])
        overlaps = np.mean([overlap(i, d) for i, d in zip(images, drawn, strict=True)])
        logger.info("edges: %.1f %% in place, overlap %.3f", 100 * placed, overlaps)
        save_grid(np.concatenate([drawn[:24], images[:24]]), worker.work / "edges.png")

    fit(worker, "edges", net, loss, lr=args.edges_lr, minutes=args.edges_minutes, batch=args.batch, ema_decay=0.98,
        muon=True, report=report)


def encode_scenes(frozen: Frozen) -> tuple[list[Scene], Tensor, np.ndarray]:
    """Return seen scenes, their latents, float16 [n, 4, 16, 16], scaled, and their edges, uint8 [n, 64, 64]."""
    args, chunk = frozen.worker.args, 64
    rng = Random(f"edges {args.seed} {frozen.worker.rank}")
    found: list[Scene] = []
    latents, hints = [], []
    for _ in tqdm(range(-(-args.scenes // chunk)), desc="latents", mininterval=10):
        layouts = [scatter(sample_layout(rng), rng) for _ in range(chunk)]
        images = drawing.draw(layouts)
        latents.append(frozen.encode(to_tensor(images)))
        hints.append(edges(images))
        found += [v.scene for v in layouts]
    return found, torch.cat(latents), np.concatenate(hints)


def save_edges(work: Path, model: Path, out: Path) -> None:
    """Write the net with the averaged weights of the last checkpoint to `out`, a diffusers folder, fp16."""
    net = build_net(UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=torch.float32))
    net.load_state_dict(torch.load(work / "edges.pt", map_location="cpu")["ema"])
    with publish(out, force=True, marker="config.json") as folder:
        net.half().save_pretrained(folder)
        (folder / "diffusion_pytorch_model.safetensors").chmod(0o644)  # safetensors leaves it to its owner alone
