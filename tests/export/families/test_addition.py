"""ControlNets and VAEs for a bundle: which fit, and what those of Stable Diffusion XL are given."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines import Bundle
from export import ExportError
from export.families.addition import open_addition
from export.families.levels import residual_specs
from export.trace.component import export_component
from models import tiny
from tests.tolerances import EXPORT_REL_RMS
from tests.tools import compvis
from tests.tools.graphs import opened

NET_PARTS = ["text", "time", "hint", "body"]


@pytest.fixture(scope="module")
def checkpoint(checkpoints) -> Path:
    return checkpoints["sd1"]


@pytest.fixture
def net(edge_net) -> Path:
    return edge_net


@pytest.fixture(scope="module")
def plain(bundles) -> Bundle:
    return Bundle.open(bundles["sd1"])


@pytest.fixture(name="controlled")
def opened_bundle(controlled) -> Bundle:
    return Bundle.open(controlled)


def test_residuals_are_where_stable_diffusion_has_them():
    config = {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2}
    found = [(spec.shape[1], spec.shape[2]) for spec in residual_specs(config)]
    levels = ["latent_height", "latent_height_2", "latent_height_4", "latent_height_8"]
    assert found == [(320, levels[0])] * 3 + [(320, levels[1])] + [(640, levels[1])] * 2 + [(640, levels[2])] + [
        (1280, levels[2])] * 2 + [(1280, levels[3])] * 4


def test_a_net_of_stable_diffusion_xl(plain, tmp_path):
    """It is given pooled text and sizes as the UNet is. In 16 bits, and cut in the same parts."""
    folder = tiny.sdxl(tmp_path / "xl")
    net = tiny.control(tmp_path / "net", folder)
    xl = opened(folder)
    unet = dataclasses.replace(plain.component("unet"), inputs=(
        *xl.modules["unet"]().inputs, *residual_specs(xl.unet)))
    manifest = dataclasses.replace(plain.manifest, family="sdxl", components={
        "unet": unet, "unet_control": dataclasses.replace(unet, variant="control")})
    got = export_component("control_xl", open_addition(net, Bundle(tmp_path, manifest), "xl"), "fp16", tmp_path)
    assert [n.removeprefix("control_xl") for n in got] == ["", *(f"_{part}" for part in NET_PARTS)]
    assert {"text_embeds", "time_ids"} < {spec.name for spec in got["control_xl"].inputs}
    assert all(0 < one.check.rel_rms < EXPORT_REL_RMS["fp16"] for one in got.values())


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("changes, message", [
    ({"_class_name": "T2IAdapter"}, "got a T2IAdapter, expected one of ControlNetModel, AutoencoderKL"),
    ({"global_pool_conditions": True}, "global_pool_conditions=True, expected False"),
    ({"num_class_embeds": 10}, "num_class_embeds=10, expected None"),
    ({"cross_attention_dim": 48}, "cross_attention_dim=48, expected 32"),
    ({"in_channels": 9}, "in_channels=9, expected 4"),
    ({"conditioning_channels": 1}, "conditioning_channels=1, expected 3"),
    ({"addition_embed_type": "text_time"}, "addition_embed_type='text_time', expected None"),
    ({"conditioning_embedding_out_channels": [8, 8, 16]}, "pixels a latent=4, expected 8"),
    ({"block_out_channels": [32, 32, 64, 32]}, "9 residuals of .* which are not the 9"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_net_that_does_not_fit(controlled, net, tmp_path, changes, message):
    folder = shutil.copytree(net, tmp_path / "net")
    edit(folder / "config.json", **changes)
    with pytest.raises(ExportError, match=message):
        open_addition(folder, controlled)


@pytest.mark.parametrize("options, message", [
    ({"latent_channels": 16}, "latent_channels=16, expected 4"),
    ({"scaling_factor": 0.13025}, "scaling_factor=0.13025, expected 0.18215"),
    ({"shift_factor": 0.1}, "shift_factor=0.1, expected 0.0"),
    ({"block_out_channels": [8, 16, 16]}, "pixels a latent=4, expected 8"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_vae_that_does_not_fit(controlled, tmp_path, options, message):
    folder = tiny.vae(tmp_path / "vae", seed=1)
    edit(folder / "config.json", **options)
    with pytest.raises(ExportError, match=message):
        open_addition(folder, controlled)


def test_what_is_no_addition(controlled, checkpoint, net, tmp_path):
    def refused(message: str, path: Path, *options: Any) -> None:
        with pytest.raises(ExportError, match=message):
            open_addition(path, controlled, *options)

    refused("no such file or folder", tmp_path / "nowhere")
    refused("no config.json, expected .* give the folder of its VAE, PATH/vae", checkpoint)
    refused("got a UNet2DConditionModel, expected one of", checkpoint / "unet")
    refused("which has its own; leave out --config", net, None, False, "sd1")
    refused("got --encoder for a ControlNet", net, None, True)
    refused("got 'a b' for the ControlNet's name, expected letters", net, "a b")
    refused("got 'my_body' for the ControlNet's name, .* do not end in _text", net, "my_body")
    refused("got the name 'x' for a VAE", tiny.vae(tmp_path / "vae", seed=1), "x")
    whole = compvis.save(compvis.from_folder(checkpoint), tmp_path / "whole.safetensors")
    refused("got a whole checkpoint, expected a ControlNet or a VAE", whole)
    save_file({"lora_unet_x.lora_up.weight": torch.ones(1)}, tmp_path / "lora.safetensors")
    refused("no ControlNet or VAE in the original layout", tmp_path / "lora.safetensors")
    state = compvis.of_control(net)
    file = compvis.save(state, tmp_path / "net.safetensors")
    refused("its architecture is not known, .* pass --config DIR", file)
    state.pop("control_model.zero_convs.2.0.bias")
    addition = open_addition(compvis.save(state, file), controlled, None, False, checkpoint)
    with pytest.raises(ExportError, match=r"lack controlnet_down_blocks\.2\.bias"):
        addition.modules["control_net"]()
    shutil.copytree(net, tmp_path / "damaged")
    os.truncate(next((tmp_path / "damaged").glob("*.safetensors")), 1000)
    with pytest.raises(ExportError, match="weights could not be read"):
        open_addition(tmp_path / "damaged", controlled).module.load()
    assert load_file(next(net.glob("*.safetensors")))
