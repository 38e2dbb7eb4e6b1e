"""The guidance step: latentrt's kernel beside the formula in torch, eager and compiled."""

from __future__ import annotations

import functools

import torch

from benchmarks import cases
from benchmarks.harness.kernels.bench import Bench, Setting, peers, random
from kernels.host import step_table
from kernels.triton import guidance_step


def make(case: cases.Latents, dtype: str, setting: Setting) -> Bench:
    """Return the contenders at one shape: guided and rescaled, with noise and a memory of three arrays.

    The table is as long as the timing can need.
    """
    latent, images, memory, rows = (4, case.height, case.width), case.images, 3, 4096
    normal = functools.partial(random, setting=setting)
    table = normal(images, 1, step_table.width(memory), dtype="fp32", seed=1).repeat(1, rows, 1)
    table[:, :, step_table.MIX:] *= 0.2  # repeated steps shrink what they are given
    table[:, :, step_table.DRAW] = torch.arange(rows)
    noise_pred = normal(2 * images, *latent, dtype=dtype)
    inputs = (noise_pred, normal(images, 1, *latent, dtype="fp32", seed=2), table,
              torch.tensor([[7.5, 0.7, 0.0]] * images, device=setting.device),
              torch.zeros(images, 3, *latent, device=setting.device),
              normal(images, 1 + memory, *latent, dtype="fp32", seed=3), torch.empty_like(noise_pred),
              torch.zeros(2 * images, device=setting.device),
              torch.tensor([[0, rows, 0]] * images, dtype=torch.int32, device=setting.device))

    def ours(*inputs: torch.Tensor) -> torch.Tensor:
        torch.ops.latentrt.guidance_step(*inputs)
        return inputs[5]

    def truth(*inputs: torch.Tensor) -> torch.Tensor:
        wide = [t.double() if t.is_floating_point() else t for t in inputs]
        guidance_step.reference(*wide)
        return wide[5]

    n = noise_pred[0].numel() * images
    moved = 4 * n * noise_pred.element_size() + (2 * (1 + memory) + 1) * n * 4
    return Bench("guidance_step", str(case), dtype, inputs, {"latentrt": ours}, peers(_eager, setting), truth, moved, 0,
                 cases.TRITON_FLOOR["fp32"])


def _eager(noise_pred: torch.Tensor, noise: torch.Tensor, table: torch.Tensor, controls: torch.Tensor,
           known: torch.Tensor, state: torch.Tensor, sample: torch.Tensor, timestep: torch.Tensor,
           progress: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Compute the guidance step of whole batches, without inpainting, at the row of the table that is next."""
    each = (-1, 1, 1, 1)
    images, states = state.shape[:2]
    batch, i = torch.arange(images, device=state.device), progress[:, 0].long()
    row, following = table[batch, i], table[batch, i + 1]
    uncond, cond = noise_pred.float().chunk(2)
    guided = uncond + controls[:, 0].view(each) * (cond - uncond)
    share = controls[:, 1].view(each)
    m = guided * (share * cond.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True) + 1 - share)
    x = state[:, 0]
    p = row[:, step_table.PREDICT_X].view(each) * x + row[:, step_table.PREDICT_M].view(each) * m
    clip = row[:, step_table.CLIP].view(each)
    p = torch.where(clip > 0, torch.minimum(torch.maximum(p, -clip), clip), p)
    mix = row[:, step_table.MIX:].reshape(images, states, states + 3)
    terms = torch.cat([torch.stack([x, p], 1), state[:, 1:], noise[:, :1], m[:, None]], 1)
    new = torch.bmm(mix, terms.flatten(2)).view_as(state)
    scaled = (new[:, 0] * following[:, step_table.INPUT_SCALE].view(each)).to(sample.dtype)
    return new, torch.cat([scaled, scaled]), following[:, step_table.TIMESTEP].repeat(2)
