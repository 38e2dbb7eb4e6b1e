"""The examples in docs/examples run, and draw what the requests that they are made of draw."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from engines import Bundle
from engines.bundle import write_manifest
from runtime import Lora, Pipeline, Request
from tests.tools.drawn import picture

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Two pictures, and two LoRAs on one projection."""
    folder = tmp_path_factory.mktemp("examples")
    for seed, name in enumerate("ab"):
        picture(64, 64, seed).save(folder / f"{name}.png")
        rng, key = np.random.default_rng(seed), "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora"
        save_file({f"{key}_A.weight": rng.standard_normal((2, 64), np.float32),
                   f"{key}_B.weight": rng.standard_normal((64, 2), np.float32)}, folder / f"{name}.safetensors")
    return folder


def test_interpolation(bundles, files, tmp_path):
    bundle, paths = str(bundles["sd1"]), [str(files / name) for name in ("a.png", "b.png", "a.safetensors",
                                                                         "b.safetensors")]
    example("interpolate").main([bundle, *paths, "--prompt", "a cat", "--frames", "3", "--steps", "4", "--backend",
                                 "onnxruntime", "-o", str(tmp_path / "way.gif")])
    with Image.open(tmp_path / "way.gif") as way:
        assert (way.n_frames, way.size, way.info["duration"]) == (3, (64, 64), 100)
    pipe = Pipeline.load(bundle, "onnxruntime", progress=False)
    pictures, loras = (Path(paths[0]), Path(paths[1])), (Path(paths[2]), Path(paths[3]))
    frames = list(example("interpolate").frames(pipe, pictures, loras, "a cat", 3, 4))
    own, both = (Lora(paths[2]),), (Lora(paths[2], 1.0), Lora(paths[3], 0.0))
    noise = pipe(Request("a cat", image=paths[0], loras=own, task="invert", steps=4, guidance=1.0, height=64, width=64,
                         output="latent")).latents
    first = pipe(Request("a cat", latents=noise, loras=both, steps=4, guidance=1.0, scheduler="ddim", height=64,
                         width=64)).images[0]
    assert np.array_equal(np.asarray(frames[0]), np.asarray(first))
    assert not np.array_equal(np.asarray(frames[1]), np.asarray(frames[2]))


def test_style_transfer(controlled, files, tmp_path):
    """The net of the bundle, under the name that the example asks for."""
    pytest.importorskip("cv2")
    bundle = shutil.copytree(controlled, tmp_path / "bundle")
    manifest = Bundle.open(bundle).manifest
    write_manifest(bundle, dataclasses.replace(manifest, components={
        name.replace("edge-net", "canny"): dataclasses.replace(
            part, label=part.label.replace("edge-net", "canny"), network=part.network.replace("edge-net", "canny"))
        for name, part in manifest.components.items()}))
    assert Bundle.open(bundle).labels == ("canny",)
    drawn, target = [], tmp_path / "styled.png"
    for control in ("0", "1"):
        example("style_transfer").main([
            str(bundle), str(files / "a.png"), str(files / "a.safetensors"), "a cat", "--steps", "4", "--seed", "1",
            "--size", "64", "128", "--control", control, "--backend", "onnxruntime", "-o", str(target)])
        drawn.append(np.asarray(Image.open(target)))
    assert drawn[0].shape == (64, 128, 3) and not np.array_equal(*drawn)
