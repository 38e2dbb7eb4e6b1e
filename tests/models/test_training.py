"""The training of models/shapes: the UNet's first weights, the loss, and what the text encoder must paint."""

import copy
from random import Random

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.hooks import RemovableHandle

from models.training.optimizer import MuonAndAdamW
from models.training.parts import build_tokenizer, build_unet
from models.training.text import PaintingHead, Tokens, cell_labels
from models.training.unet import LevelledLoss
from models.world import drawing, scenes
from models.world.captions import describe, parse, training_caption
from models.world.layouts import sample_layout
from models.world.scenes import Layout, Object, Scene


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return build_unet().eval()


def run(unet: UNet2DConditionModel, x: torch.Tensor, t: int = 900) -> torch.Tensor:
    text = torch.randn(len(x), 32, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return unet(x, torch.full((len(x),), t), text).sample


@pytest.mark.parametrize("t", [1, 999])
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_a_new_unet_returns_its_input(unet: UNet2DConditionModel, t: int, offset: float) -> None:
    x = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(2)) + offset
    assert (run(unet, x, t) - x).square().mean() < 1e-4


def test_a_new_unet_marks_columns_and_rows_for_its_attention(unet: UNet2DConditionModel) -> None:
    seen: dict[str, torch.Tensor] = {}
    names = ["mid_block.attentions.0", *(f"up_blocks.{i}.attentions.{j}" for i in (0, 1) for j in (0, 1))]

    def keep(name: str) -> RemovableHandle:
        return unet.get_submodule(name).register_forward_hook(lambda _, args, __: seen.update({name: args[0]}))

    hooks = [keep(name) for name in names]
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    run(unet, x)
    for hook in hooks:
        hook.remove()
    for name, hidden in seen.items():
        marks = hidden[:, -10:-2]
        assert torch.allclose(marks[0], marks[1], atol=0.1), f"{name}: the marks depend on the input"
        cells = marks[0].flatten(1).T
        distances = torch.cdist(cells, cells) + 9 * torch.eye(len(cells))
        assert distances.min() > 0.5, f"{name}: two cells of {hidden.shape[-1]} a side have the same marks"
        assert marks[0, :4].std(1).max() < 1e-5 and marks[0, 4:].std(2).max() < 1e-5


def test_every_band_of_timesteps_has_the_same_say() -> None:
    levelled = LevelledLoss(1000, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    noise = torch.zeros(64, 1, 2, 2)
    for _ in range(1000):
        t = torch.randint(0, 1000, (64,), generator=generator)
        error = 10.0 ** -(t // 250)  # RMS, from 1 at low to 0.001 at high timesteps
        levelled(error[:, None, None, None].expand_as(noise), noise, t)
    losses = [float(levelled(torch.full_like(noise, 10.0**-i), noise, torch.full((64,), 250 * i + 25)))
              for i in range(4)]
    assert losses == pytest.approx([losses[0]] * 4, rel=0.05)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_muon_steps_a_convolution_by_an_orthogonal_matrix_adamw_the_rest(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(16, 12, 3).to(memory_format=memory_format)
    before = {name: p.detach().clone() for name, p in conv.named_parameters()}
    x = torch.randn(4, 16, 8, 8)
    optimizer = MuonAndAdamW(list(conv.parameters()), lr=0.01, weight_decay=0.0)
    conv(x).square().mean().backward()
    gradient = conv.weight.grad.clone()
    optimizer.step()
    optimizer.zero_grad()
    assert conv.weight.grad is None and conv.bias.grad is None
    change = (before["weight"] - conv.weight.detach()).flatten(1)
    singular = torch.linalg.svdvals(change) / (0.01 * 0.2 * (16 * 9) ** 0.5)
    assert singular.min() > 0.6 and singular.max() < 1.3  # Newton-Schulz's five steps come as near to 1 as this
    left, _, right = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(change.flatten(), (left @ right).flatten(), dim=0)
    assert cosine > 0.95
    assert torch.allclose((before["bias"] - conv.bias.detach()).abs(), torch.tensor(0.01), rtol=1e-3)


def test_an_optimizer_goes_on_from_its_state() -> None:
    def trained(steps: int, state: dict | None = None, weights: dict | None = None) -> tuple[dict, dict]:
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        optimizer = MuonAndAdamW(list(module.parameters()), lr=0.01)
        if state and weights:
            module.load_state_dict(weights)
            optimizer.load_state_dict(state)
        for _ in range(steps):
            module(torch.ones(2, 16)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return copy.deepcopy(optimizer.state_dict()), copy.deepcopy(module.state_dict())

    _, through = trained(6)
    _, resumed = trained(3, *trained(3))
    assert all(torch.equal(through[name], resumed[name]) for name in through)


def test_tokens_are_those_of_the_tokenizer(tmp_path) -> None:
    tokenizer, rng = build_tokenizer(tmp_path), Random(0)
    captions = [describe(sample_layout(rng).scene, rng).caption for _ in range(200)]
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(Tokens(tokenizer)(captions), ids)


def test_cells_show_what_was_drawn() -> None:
    scene = Scene((Object("star", "red", "large"), Object("cross", "cyan", "small")), ("left of",), "navy")
    layout = Layout(scene, (9.6, 6.4), ((16.0, 32.0), (48.0, 32.0)))
    labels = cell_labels([layout]).reshape(3, 8, 8).numpy()
    colours, shapes, sizes = ([names[i] for i in part.flat] for names, part in
                              zip(PaintingHead.NAMES, labels, strict=True))
    image = drawing.draw([layout])[0][4::8, 4::8].reshape(-1, 3)
    palette = scenes.COLOURS | scenes.BACKGROUNDS

    def nearest(pixel: np.ndarray) -> str:
        return min(palette, key=lambda name: int(np.abs(np.array(palette[name]) - pixel).sum()))

    shown = [nearest(pixel) for pixel in image.astype(int)]
    agree = np.mean([a == b for a, b in zip(colours, shown, strict=True)])
    assert agree > 0.9 and set(shapes) == {"star", "cross", None} and set(sizes) == {"large", "small", None}
    assert {(c, s) for c, s in zip(colours, shapes, strict=True)} == {
        ("red", "star"), ("cyan", "cross"), ("navy", None)}


def test_training_captions_may_be_told_in_full() -> None:
    rng = Random(0)
    for _ in range(300):
        scene = sample_layout(rng).scene
        if text := training_caption(scene, rng, open_share=0.0):
            told = parse(text)
            assert not told.held_out and {told.background, *(o.size for o in told.objects)}.isdisjoint({None})
