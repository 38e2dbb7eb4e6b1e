"""Every variant of a denoiser, VAE or text encoder that the examples of the Stable Diffusion family need can be built.

| variant | values | shown by |
|---|---|---|
| UNet input channels | 4, 5, 7, 9 | `test_channels_and_scales`; pictures in test_tasks.py |
| width of the text | 768, 1024, as published | test_checkpoint.py (weights of that size); small ones in pictures |
| prediction | epsilon, v | test_pipeline.py (SD 1 and 2), test_tasks.py (upscaler) |
| further UNet inputs | labels; 12 + 1 residuals; weights of LoRAs | test_tasks.py; test_control.py; test_lora.py |
| UNet inputs and outputs | what attention on the way up was given in other frames, and in this | test_video.py |
| heads | 8 at every level; of 64 | SD 1 and SD 2 in test_pipeline.py |
| latent sizes | 64x64 to 128x128, 64x80 | `test_latent_sizes` |
| batch | B, and 2B with guidance, of 1, 2, 3 | `test_batches`; pictures in test_pipeline.py |
| latent scale, VAE | 0.18215 and f = 8; 0.08333 and f = 4; encoder or none | `test_channels_and_scales` |
| schedule | scaled linear of both; linear | `test_channels_and_scales`, `test_ddpm_and_ddim_of_toys` |
| text encoder | last layer; last but one | test_export.py, test_checkpoint.py; test_sdxl.py |
| what a bundle says it does | | test_tasks.py |
| other networks | tests/tools/toys.py | `test_networks_of_other_models` |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import engines
from engines import Bundle, EngineConfig, store
from engines.backend import Target
from engines.check import compare
from engines.spec import TensorSpec
from export.trace.module import trace_module
from runtime.schedulers import make_table
from tests.runtime.schedulers.test_schedulers import SHAPE, model, run_table
from tests.tolerances import ENGINE_REL_RMS, EXPORT_REL_RMS, SCHEDULER_REL
from tests.tools import toys

BETAS = (0.00085, 0.012)


@pytest.mark.parametrize(("name", "channels", "scale", "factor", "betas"), [
    ("sd1", 4, 0.18215, 8, BETAS), ("sd2", 4, 0.18215, 8, BETAS), ("depth", 5, 0.18215, 8, BETAS),
    ("upscaler", 7, 0.08333, 4, (1e-4, 0.02)), ("inpainting", 9, 0.18215, 8, BETAS),
    ("inpainting_2", 9, 0.18215, 8, BETAS)])
def test_channels_and_scales(bundles, name, channels, scale, factor, betas):
    manifest = Bundle.open(bundles[name]).manifest
    assert 4 + sum(extra.channels for extra in manifest.joined) == channels
    assert (manifest.latent.scale, manifest.latent.factor) == (scale, factor)
    config = manifest.scheduler
    assert (config["beta_schedule"], config["beta_start"], config["beta_end"]) == ("scaled_linear", *betas)
    assert {"vae_encoder", "vae_decoder", "text_encoder", "unet_body"} <= set(manifest.components)


@pytest.mark.parametrize(("name", "latents"), [
    ("sd2", (64, 64)), ("sd2", (64, 96)), ("sd2", (96, 96)), ("upscaler", (128, 128)), ("sd2", (64, 80)),
    ("depth", (60, 80))], ids=lambda value: value if isinstance(value, str) else f"{value[0]}x{value[1]}")
def test_latent_sizes(bundles, name, latents):
    """Of 512x512, 512x768 and 768x768 pictures, of the upscaler's 512x512, and of 480x640, as it is or padded."""
    bundle = Bundle.open(bundles[name])
    height, width = (side * bundle.manifest.latent.factor for side in latents)
    config = bundle.config("unet_body", backend="openvino", batch=1, size=(height, width))
    record = store.Record.read(store.build(bundle, "unet_body", config), "")
    assert record.check.rel_rms < ENGINE_REL_RMS["fp32"]
    assert {spec.resolve(config.dims).shape[2:] for spec in bundle.component("unet_body").outputs} == {latents}


def test_batches(bundles):
    """The rows that one, two and three pictures have, with guidance and without."""
    bundle = Bundle.open(bundles["sd2"])
    plan = store.plan(bundle, "openvino", sizes=[(64, 64)], batches=[1, 2, 3], components=["unet_body"])
    assert sorted(config.dims["batch"] for _, config in plan) == [1, 2, 3, 4, 6]
    for name, config in plan:
        assert store.Record.read(store.build(bundle, name, config), "").check.rel_rms < ENGINE_REL_RMS["fp32"]


class Network(NamedTuple):
    """make: the module. inputs: their specs, and an example of them. outputs: their specs."""

    make: Callable[[], nn.Module]
    inputs: tuple[TensorSpec, ...]
    example: tuple[torch.Tensor, ...]
    outputs: tuple[TensorSpec, ...]


def spec(name: str, *shape: int | str, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name, dtype, ("batch", *shape))


def numbers(below: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, below, shape))


def normal(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(2).standard_normal(shape).astype(np.float32))


TIME, CONDITION = spec("timestep", dtype="int64"), 256
NETWORKS = {
    "digits": Network(toys.DigitsUNet, (spec("sample", 1, 28, 28), TIME), (normal(2, 1, 28, 28), numbers(1000, 2)),
                      (spec("noise_pred", 1, 28, 28),)),
    "faces": Network(lambda: toys.FacesUNet(residuals=1), (spec("sample", 3, 64, 64), TIME),
                     (normal(2, 3, 64, 64), numbers(1000, 2)), (spec("noise_pred", 3, 64, 64),)),
    "vqvae": Network(toys.VQVAE, (spec("image", 1, 28, 28),), (normal(2, 1, 28, 28).sigmoid(),),
                     (spec("codes", 7, 7, dtype="int64"), spec("picture", 1, 28, 28))),
    "pixelcnn": Network(lambda: toys.PixelCNN(blocks=4), (spec("codes", 7, 7, dtype="int64"),), (numbers(32, 2, 7, 7),),
                        (spec("logits", 32, 7, 7),)),
    "vqgan": Network(toys.VQGAN, (spec("image", 3, 64, 64),), (normal(2, 3, 64, 64).tanh(),),
                     (spec("codes", 4, 4, dtype="int64"), spec("picture", 3, 64, 64))),
    "gpt": Network(toys.GPT, (spec("codes", "sequence", dtype="int64"),), (numbers(64, 2, 2 * CONDITION - 1),),
                   (spec("logits", "sequence", 64),))}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_other_models(tmp_path, name):
    """Traced; built and run for another batch on ONNX Runtime and OpenVINO, and in torch as inductor reads them."""
    network = NETWORKS[name]
    torch.manual_seed(0)
    module = network.make().eval()
    if hasattr(module, "book"):
        spread(module, network.example[0])
    file = tmp_path / f"{name}.onnx"
    component = trace_module(module, network.inputs, network.outputs, network.example, file)
    assert component.check.rel_rms < EXPORT_REL_RMS["fp32"]
    example = [value[:1] for value in network.example]
    with torch.no_grad():
        found = module(*example)
    expected = dict(zip((one.name for one in network.outputs), found if isinstance(found, tuple) else (found,),
                        strict=True))
    feed = {one.name: value.numpy() for one, value in zip(network.inputs, example, strict=True)}
    sizes = {"sequence": 2 * CONDITION - 1} if name == "gpt" else {}
    results = {"inductor": in_torch(file, feed)}
    for backend in ("onnxruntime", "openvino"):
        config, directory = EngineConfig(backend, {"batch": 1, **sizes}), tmp_path / backend
        target = Target(tmp_path, name, component, config)
        directory.mkdir()
        engines.backend(backend).build(target, directory)
        results[backend] = compare.run(engines.backend(backend).load(target, directory), feed)
    for backend, got in results.items():
        for output, truth in expected.items():
            if output == "codes":
                assert len(np.unique(truth)) > 4
                np.testing.assert_array_equal(got[output], truth.numpy(), err_msg=backend)
            else:
                assert compare.difference(got[output], truth.numpy()).rel_rms < ENGINE_REL_RMS["fp32"], backend


def spread(module: Any, image: torch.Tensor) -> None:
    """Codes that all occur, as those of a trained book do: what the encoder makes of other pictures, at random."""
    with torch.no_grad():
        z = module.encoder(image.flip(1, 2, 3).repeat(8, 1, 1, 1) * normal(16, 1, 1, 1))
        z = getattr(module, "quant", nn.Identity())(z).permute(0, 2, 3, 1).flatten(0, 2)
        module.book.weight.copy_(z[numbers(len(z), len(module.book.weight))])


def in_torch(file: Any, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The graph as the module that inductor compiles; to compile it takes a minute."""
    from engines.inductor import module as onnx_torch
    from engines.inductor import nodes as onnx_nodes
    from tests.engines.inductor.test_backend import filled

    graph = onnx_torch.rewrite(onnx_nodes.read(file), True)
    shapes = {name: (value.shape, str(value.dtype)) for name, value in feed.items()}
    module = filled(onnx_torch.build(onnx_torch.survey(graph, shapes, "fp32", frozenset()), "fp32", "cpu"))
    with torch.no_grad():
        found = module(*(torch.from_numpy(feed[name]) for name in graph.inputs))
    return {name: value.numpy() for name, value in zip(graph.outputs, found, strict=True)}


LINEAR = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02,
          "clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
"""Of the first DDPM (arXiv 2006.11239), with DDIM's steps counted from the end."""


def signal() -> np.ndarray:
    return np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def ddpm(draw: Callable[[], np.ndarray], simple: bool) -> np.ndarray:
    """x after every step: mean (x − β / √(1 − ā) · ε) / √(1 − β), variance β, or that of the posterior."""
    share = signal()
    x = draw()
    for t in reversed(range(1000)):
        before = share[t - 1] if t else 1.0
        beta = 1 - share[t] / before
        variance = beta if simple else (1 - before) / (1 - share[t]) * beta
        x = (x - beta / math.sqrt(1 - share[t]) * model(x, t)) / math.sqrt(1 - beta)
        x = x + math.sqrt(variance) * draw() if t else x
    return x


def ddim(draw: Callable[[], np.ndarray], steps: int, eta: float, simple: bool) -> np.ndarray:
    """DDIM whose η is a share of the variance; simple: η = 1 in the direction, and √(1 − ā / ā_prev) of noise."""
    share = signal()
    times = np.linspace(1000, 0, steps + 1).astype(int)
    x = draw()
    for now, then in zip(times[:-1] - 1, times[1:] - 1, strict=True):
        a, b = share[now], share[then] if then >= 0 else 1.0
        variance = (1.0 if simple else eta) * (1 - b) / (1 - a) * (1 - a / b)
        deviation = math.sqrt(1 - a / b) if simple else math.sqrt(variance)
        direction = math.sqrt(1 - b - variance) - math.sqrt(b * (1 - a) / a)
        x = math.sqrt(b / a) * x + direction * model(x, now)
        x = x + deviation * draw() if deviation else x
    return x


@pytest.mark.parametrize(("options", "arguments", "truth"), [
    ({"variance_type": "fixed_large"}, {"steps": 1000}, lambda draw: ddpm(draw, True)),
    ({"variance_type": "fixed_small"}, {"steps": 1000}, lambda draw: ddpm(draw, False)),
    ({}, {"steps": 20, "scheduler": "ddim"}, lambda draw: ddim(draw, 20, 0.0, False)),
    ({}, {"steps": 20, "scheduler": "ddim", "eta": math.sqrt(0.3)}, lambda draw: ddim(draw, 20, 0.3, False)),
    ({"variance_type": "fixed_large"}, {"steps": None, "timesteps": [*(np.linspace(1000, 0, 31).astype(int)[:-1] - 1)]},
     lambda draw: ddim(draw, 30, 1.0, True)),
], ids=["ddpm-simple", "ddpm-posterior", "ddim", "ddim-variance", "ddim-simple"])
def test_ddpm_and_ddim_of_toys(options, arguments, truth):
    """The plain formulas. DDIM's η scales the deviation here, as in its paper, so a share of the variance is its square
    root. What no table says: DDIM of other η in a number of steps that does not divide 1000, which others round.
    """
    table = make_table(LINEAR | options, **arguments)
    generator = torch.Generator().manual_seed(3)
    expected = truth(lambda: torch.randn(SHAPE, generator=generator).numpy().astype(np.float64))
    got = run_table(table, np.float64)[-1]
    assert np.abs(got - expected).max() / np.abs(expected).max() < SCHEDULER_REL
