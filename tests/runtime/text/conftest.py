"""Tiny random models with diffusers' pipeline and ours."""

from __future__ import annotations

import diffusers
import pytest
import torch

from engines import Bundle
from runtime import Pipeline
from runtime.config import PipelineConfig
from runtime.networks.shelf import Shelf
from runtime.text.encoders import TextEncoders


@pytest.fixture(scope="package", params=["sd1", "sd2"])
def model(request, checkpoints, bundles):
    """(diffusers pipeline, our pipeline) of a tiny random checkpoint; 2.x pads with another token than the end."""
    reference = diffusers.StableDiffusionPipeline.from_pretrained(checkpoints[request.param], safety_checker=None,
                                                                  dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    return reference, Pipeline.load(bundles[request.param], "onnxruntime", size=(64, 64))


@pytest.fixture(scope="package")
def xl(checkpoints, bundles):
    """(diffusers pipeline, our text encoders) of a tiny Stable Diffusion XL."""
    bundle = Bundle.open(bundles["sdxl"])
    reference = diffusers.StableDiffusionXLPipeline.from_pretrained(checkpoints["sdxl"], dtype=torch.float32)
    return reference, TextEncoders(Shelf(bundle, PipelineConfig("onnxruntime", "fp32", "cpu", (64, 64))))


@pytest.fixture(scope="module")
def vectors():
    """Three vectors of the first text encoder's width, and of the second's, as large as a tiny encoder's own are."""
    generator = torch.Generator().manual_seed(0)
    return {width: 0.1 * torch.randn(3, width, generator=generator) for width in (32, 48)}


@pytest.fixture
def width(model):
    return model[0].text_encoder.config.hidden_size
