"""The judge stage of the adapters: what held-out captions become with the ControlNet and with the LoRA."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from export import export
from export.attach import attach
from models.world import drawing, placed
from models.world.adherence import check
from models.world.layouts import held_out
from models.world.steering import in_place, in_style, overlap
from runtime import Control, Lora, Pipeline, Request

logger = logging.getLogger(__name__)

EDGES, STYLE = "shapes-edges", "shapes-red-chalk"
NAME = "edges"
"""Name of the ControlNet in the bundle."""
SCALES = (0.0, 0.5, 1.0)


def judge_adapters(model: Path, out: Path, work: Path, captions: int) -> None:
    """Log the figures of models/README.md: 20 DDIM steps, guidance 2, onnxruntime in fp32, caption i from seed i."""
    bundle = work / "shapes.bundle"
    export(model, bundle, force=bundle.exists(), progress=False)
    attach(out / EDGES, bundle, NAME, progress=False)
    pipe = Pipeline.load(bundle, "onnxruntime", batch=8, progress=False)
    judge_edges(pipe, captions)
    judge_style(pipe, out / STYLE / "pytorch_lora_weights.safetensors", captions)


def draw(pipe: Pipeline, requests: Sequence[Request]) -> list[np.ndarray]:
    """Return pictures, uint8 [64, 64, 3], of requests for one each."""
    return [np.asarray(result.images[0]) for result in pipe(list(requests))]


def ask(caption: str, seed: int) -> Request:
    """Return the request that every figure is drawn with."""
    return Request(caption, seed=seed, steps=20, guidance=2.0, scheduler="ddim")


def judge_edges(pipe: Pipeline, count: int) -> dict[str, tuple[float, float, float]]:
    """Return shares of pictures that show their caption, and that in the hint's place, and the mean overlap, by name.

    The names are "without a hint" and "with it".
    """
    asked = placed.held_out(count)
    drawn = drawing.draw([layout for layout, _ in asked])
    hints = [Image.fromarray(hint).convert("RGB") for hint in placed.edges(drawn)]
    plain = [ask(told.caption, i) for i, (_, told) in enumerate(asked)]
    steered = [replace(r, control=(Control(NAME, hint),)) for r, hint in zip(plain, hints, strict=True)]
    found = {}
    for name, requests in (("without a hint", plain), ("with it", steered)):
        images = draw(pipe, requests)
        verdicts = [check(image, told).ok for image, (_, told) in zip(images, asked, strict=True)]
        stand = [in_place(image, *one) for image, one in zip(images, asked, strict=True)]
        overlaps = [overlap(image, scene) for image, scene in zip(images, drawn, strict=True)]
        found[name] = float(np.mean(verdicts)), float(np.mean(stand)), float(np.mean(overlaps))
        logger.info("edges: %s: %.1f %% of %d show their caption, %.1f %% in its place, overlap %.3f", name,
                    100 * found[name][0], count, 100 * found[name][1], found[name][2])
    return found


def judge_style(pipe: Pipeline, file: Path, count: int) -> dict[float, tuple[float, float]]:
    """Return by scale the shares of pictures in the style, and of those that show their caption but for colours."""
    told = held_out(count)
    plain = [ask(scene.caption, i) for i, scene in enumerate(told)]
    without = draw(pipe, plain)
    found = {}
    for scale in SCALES:
        images = draw(pipe, [replace(request, loras=(Lora(str(file), scale),)) for request in plain])
        styled = np.mean([in_style(image) for image in images])
        right = np.mean([check(image, scene, colours=False).ok for image, scene in zip(images, told, strict=True)])
        found[scale] = float(styled), float(right)
        same = sum(np.array_equal(a, b) for a, b in zip(images, without, strict=True))
        logger.info("style: at %g %.1f %% of %d are in it, %.1f %% show their caption but for colours, %d are the "
                    "picture without it", scale, 100 * styled, count, 100 * right, same)
    return found
