"""Pictures to draw from, and what diffusers' pipelines draw from them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from runtime import Pipeline, Request
from runtime.schedulers import SCHEDULERS
from tests.tolerances import IMAGE_MAX

SIZE = (64, 128)
PROMPT, NEGATIVE = "a cat and a horse", "rain"


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Coloured waves."""
    phase = np.random.default_rng(seed).uniform(0, 6, 3)
    y, x = np.mgrid[:height, :width] / 9
    waves = [np.sin(x * (1 + k / 3) + p) + np.cos(y + k * p) for k, p in enumerate(phase)]
    return Image.fromarray(((np.stack(waves, axis=2) + 2) * 63.75).astype(np.uint8))


def disc(height: int, width: int) -> Image.Image:
    """White with a soft edge on black: a mask."""
    y, x = np.mgrid[:height, :width]
    away = np.hypot(y - height / 2, x - width / 3)
    return Image.fromarray(((height / 3 - away) * 40 + 128).clip(0, 255).astype(np.uint8))


IMAGE, MASK = picture(*SIZE), disc(*SIZE)
DEPTH = np.hypot(*np.mgrid[:48, :100]).astype(np.float32)


def reference(kind: str, checkpoint: Path, scheduler: str | None = None) -> Any:
    pipe = getattr(diffusers, kind).from_pretrained(checkpoint, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if scheduler:
        short, karras, _ = scheduler.partition("_karras")
        name, overrides = SCHEDULERS[short]
        overrides = {**overrides, "use_karras_sigmas": True} if karras else overrides
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **overrides)
    return pipe


def drawn_by(pipe: Any, request: Request, **options: Any) -> np.ndarray:
    """float32 [n, H, W, 3] of diffusers for images of consecutive seeds."""
    seed = request.seed or 0
    return pipe([request.prompt] * request.count, negative_prompt=[request.negative_prompt] * request.count,
                num_inference_steps=request.steps, guidance_scale=request.guidance, output_type="np",
                generator=[torch.Generator("cpu").manual_seed(seed + i) for i in range(request.count)],
                **options).images


def request_of(**options: Any) -> Request:
    return Request(**{"prompt": PROMPT, "negative_prompt": NEGATIVE, "steps": 6, "seed": 3, **options})


def assert_same(ours: Pipeline, request: Request, expected: np.ndarray) -> None:
    got = ours.decode(ours(dataclasses.replace(request, output="latent")).latents)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=IMAGE_MAX, rtol=0)
