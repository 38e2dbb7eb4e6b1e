"""Pipelines and LoRAs that the tests of this room share."""

from __future__ import annotations

import diffusers
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from runtime import Pipeline
from tests.cases.lora import write_kohya


@pytest.fixture(scope="module")
def reference(checkpoints):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(checkpoints["sd1"], safety_checker=None,
                                                             dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def ours(bundles):
    return Pipeline.load(bundles["sd1"], "onnxruntime", size=(64, 64), batch=1, progress=False)


@pytest.fixture(scope="module")
def kohya(reference, tmp_path_factory):
    """Every kind of layer of the UNet and the text encoder in kohya's dialect, with ranks that differ, and one α.

    With several, diffusers takes the most frequent one for most layers.
    """
    return write_kohya(tmp_path_factory.mktemp("loras") / "kohya.safetensors", reference)


@pytest.fixture(scope="module")
def peft(checkpoints, tmp_path_factory):
    """Attention alone, by PEFT and diffusers' own writer: α is in the metadata, and not the rank."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(checkpoints["sd1"], safety_checker=None)
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_k", "to_v", "to_out.0"],
                                     alpha_pattern={"mid_block.*to_q": 3}), "style")
    generator = torch.Generator().manual_seed(2)
    state = {name: 0.1 * torch.randn(value.shape, generator=generator)
             for name, value in get_peft_model_state_dict(pipe.unet, adapter_name="style").items()}
    folder = tmp_path_factory.mktemp("loras")
    pipe.save_lora_weights(folder, unet_lora_layers=state, unet_lora_adapter_metadata={
        key: sorted(value) if isinstance(value, set) else value
        for key, value in pipe.unet.peft_config["style"].to_dict().items()})
    return folder / "pytorch_lora_weights.safetensors"
