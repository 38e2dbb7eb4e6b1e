"""What `python -m benchmarks tasks` draws: tiny random models of every layout, and a request of each task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from engines import Bundle
from export import export
from export.attach import attach
from runtime import Control, Lora, Request

SIZE = (64, 128)
STEPS = 3
WORD = "wug"
"""What the textual inversion is named."""
ATTENTION = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")


@dataclass(frozen=True)
class Case:
    """A row of the table. model: of MODELS. given: fields of Request, or what makes them of a Model.

    nets: how many ControlNets it uses. encodes: whether it begins with a picture. refits: whether weights change.
    video: whether with several.
    """

    name: str
    model: str
    given: Callable[[Model], Mapping[str, Any]] = field(default=lambda model: {})
    nets: int = 0
    encodes: bool = False
    refits: bool = False
    video: bool = False

    def request(self, model: Model) -> Request:
        size = {} if self.encodes or self.model == "upscaler" else {"height": SIZE[0], "width": SIZE[1]}
        return Request(**{"prompt": "a cat and a horse", "negative_prompt": "rain", "steps": STEPS, "seed": 3,
                          "output": "latent", **size, **self.given(model)})


@dataclass(frozen=True)
class Model:
    """A tiny checkpoint of models/tiny.py in directory `path`, made when it is first asked for, if it is not there yet.

    name: of its maker, options: of the same. nets: how many ControlNets its bundle has, named net0, net1 …
    """

    name: str
    path: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    nets: int = 0

    @cached_property
    def checkpoint(self) -> Path:
        path = self.path / "checkpoint"
        return path if path.is_dir() else getattr(_tiny(), self.name)(path, **self.options)

    @cached_property
    def bundle(self) -> Bundle:
        path = self.path / "bundle"
        found = Bundle.open(path) if path.is_dir() else export(self.checkpoint, path, progress=False)
        for n in range(len(found.labels), self.nets):
            found = attach(_tiny().control(self.path / f"net{n}", self.checkpoint, seed=n), path, progress=False)
        return found

    def lora(self, seed: int) -> Path:
        """Every attention of the UNet, rank 2, as PEFT writes it; it changes a weight by about a tenth."""
        rng, tensors = np.random.default_rng(seed), {}
        for name, value in load_file(self.checkpoint / "unet" / "diffusion_pytorch_model.safetensors").items():
            if name.endswith(ATTENTION):
                layer = f"unet.{name.removesuffix('.weight')}"
                tensors[f"{layer}.lora_A.weight"] = rng.standard_normal((2, value.shape[1])).astype(np.float32)
                up = rng.standard_normal((value.shape[0], 2)) * 0.07 * value.std()
                tensors[f"{layer}.lora_B.weight"] = up.astype(np.float32)
        path = self.path / f"lora{seed}.safetensors"
        save_file(tensors, path)
        return path

    def embedding(self) -> Path:
        """Two vectors that stand for WORD."""
        table = load_file(self.checkpoint / "text_encoder" / "model.safetensors")
        width = next(value.shape[1] for name, value in table.items() if name.endswith("token_embedding.weight"))
        path = self.path / f"{WORD}.safetensors"
        save_file({WORD: np.random.default_rng(4).standard_normal((2, width)).astype(np.float32) * 0.1}, path)
        return path


def _tiny() -> Any:
    """The makers, without what their libraries say when they are imported and write."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from diffusers.utils import logging

    logging.disable_progress_bar()
    from models import tiny

    return tiny


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Coloured waves, uint8 [height, width, 3]."""
    phase = np.random.default_rng(seed).uniform(0, 6, 3)
    y, x = np.mgrid[:height, :width] / 9
    waves = [np.sin(x * (1 + k / 3) + p) + np.cos(y + k * p) for k, p in enumerate(phase)]
    return ((np.stack(waves, axis=2) + 2) * 63.75).astype(np.uint8)


def disc(height: int, width: int) -> np.ndarray:
    """White with a soft edge on black, uint8 [height, width, 3]: a mask."""
    y, x = np.mgrid[:height, :width]
    away = np.hypot(y - height / 2, x - width / 3)
    return np.stack([((height / 3 - away) * 40 + 128).clip(0, 255).astype(np.uint8)] * 3, axis=2)


def models(directory: Path) -> dict[str, Model]:
    """Every model of CASES by name; nothing is made yet."""
    options: dict[str, dict[str, Any]] = {"sd1": {"levels": 2}, "sd2": {"levels": 2}}
    nets = {"sd1": 2, "sdxl": 1}
    return {name: Model(name, directory / name, options.get(name, {}), nets.get(name, 0))
            for name in dict.fromkeys(case.model for case in CASES)}


IMAGE, MASK, HINT, OTHER = picture(*SIZE), disc(*SIZE), picture(*SIZE, seed=1), picture(40, 90, seed=2)
LOW = picture(SIZE[0] // 4, SIZE[1] // 4, seed=1)
DEPTH = np.hypot(*np.mgrid[:48, :100]).astype(np.float32)
_EDGES, _POSE = Control("net0", HINT, scale=0.7), Control("net1", OTHER, end=0.7)

CASES = (
    Case("text-to-image", "sd1"),
    Case("text-to-image, SD 2 (v)", "sd2"),
    Case("weights and textual inversion", "sd1", lambda model: {
        "prompt": f"a ({WORD}:1.3) and a [horse]", "prompt_style": "weighted", "embeddings": (model.embedding(),)}),
    Case("image-to-image", "sd1", lambda _: {"image": IMAGE, "strength": 0.7}, encodes=True),
    Case("inpaint, by blending", "sd1", lambda _: {"image": IMAGE, "mask": MASK}, encodes=True),
    Case("inpaint, 9 channels, SD 1", "inpainting", lambda _: {"image": IMAGE, "mask": MASK}, encodes=True),
    Case("inpaint, 9 channels, SD 2", "inpainting_2", lambda _: {"image": IMAGE, "mask": MASK}, encodes=True),
    Case("depth-to-image", "depth", lambda _: {"image": IMAGE, "depth": DEPTH}, encodes=True),
    Case("upscale", "upscaler", lambda _: {"image": LOW}),
    Case("invert", "sd2", lambda _: {"image": IMAGE, "task": "invert", "guidance": 1.0}, encodes=True),
    Case("XL, text-to-image", "sdxl"),
    Case("XL, the refiner", "refiner", lambda _: {"image": IMAGE, "strength": 0.7}, encodes=True),
    Case("a ControlNet", "sd1", lambda _: {"control": _EDGES}, nets=1),
    Case("two ControlNets, image-to-image", "sd1", lambda _: {
        "control": (_EDGES, _POSE), "image": IMAGE, "strength": 0.7}, nets=2, encodes=True),
    Case("a ControlNet, XL", "sdxl", lambda _: {"control": _EDGES}, nets=1),
    Case("video, with a ControlNet", "sd1", lambda _: {
        "frames": [IMAGE, np.roll(IMAGE, 9, 1), HINT], "control": _EDGES, "strength": 0.7}, nets=1, encodes=True,
        video=True),
    Case("two LoRAs", "sd1", lambda model: {
        "loras": (Lora(str(model.lora(0)), 0.8), Lora(str(model.lora(1)), -0.5))}, refits=True),
)
