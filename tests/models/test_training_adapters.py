"""The training of the shapes model's ControlNet and LoRA: where they start, and what they are shown."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from models.training.adapters.edges import build_net
from models.training.adapters.frozen import BLIND, Frozen, batches
from models.training.adapters.style import add_lora
from models.training.parts import build_scheduler, build_unet


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return build_unet().eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([10, 900]),
            torch.randn(2, 32, 128, generator=generator))


@torch.no_grad()
def test_a_new_net_adds_nothing_and_its_weights_are_the_unets(unet: UNet2DConditionModel) -> None:
    net = build_net(unet).eval()
    hint = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    skips, middle = net(*inputs(), hint, return_dict=False)
    assert not any(one.any() for one in (*skips, middle))
    assert [one.shape[1:] for one in (*skips, middle)] == [
        (48, 16, 16), (48, 16, 16), (48, 8, 8), (96, 8, 8), (96, 4, 4), (128, 4, 4), (128, 4, 4)]
    taken = dict(unet.named_parameters())
    for name, weight in net.named_parameters():
        assert name.startswith("controlnet") or torch.equal(weight, taken[name]), name


@torch.no_grad()
def test_a_new_lora_changes_nothing_and_is_all_that_learns(unet: UNet2DConditionModel) -> None:
    before = unet(*inputs()).sample
    after = add_lora(unet)(*inputs()).sample
    assert torch.equal(before, after)
    learning = [name for name, p in unet.named_parameters() if p.requires_grad]
    assert learning and all("lora" in name for name in learning)


def test_every_row_is_drawn_once_an_epoch_in_whole_batches() -> None:
    rows = batches(Random(0), 10, 4)
    for _ in range(3):
        epoch = [*next(rows), *next(rows)]
        assert len(set(epoch)) == 8 and set(epoch) < set(range(10))


def test_blind_rows_are_noise_alone_and_what_is_asked_for_leads_to_the_latents() -> None:
    frozen: Any = Frozen.__new__(Frozen)
    frozen.worker = SimpleNamespace(device=torch.device("cpu"), args=SimpleNamespace(noise_offset=0.0))
    frozen.scheduler, frozen.timesteps = build_scheduler(), 1000
    torch.manual_seed(0)
    x = torch.full((4000, 1, 2, 2), 3.0)
    noisy, noise, t = frozen.noisy(x, blind=1000)
    kept = frozen.scheduler.alphas_cumprod[t, None, None, None]
    assert torch.allclose((noisy - (1 - kept).sqrt() * noise) / kept.sqrt(), x, atol=1e-3)  # of every row
    assert t[:1000].min() >= BLIND and t[1000:].min() < 10 and noisy[:1000].mean().abs() < 0.05
    assert noisy[1000:].mean() > 1
    frozen.levelled = lambda predicted, noise, t: t
    bands = frozen.loss(noisy, noise, t, blind=1000)
    assert torch.equal(bands[1000:], t[1000:]) and torch.equal(bands[:1000], t[:1000] + 1000)
