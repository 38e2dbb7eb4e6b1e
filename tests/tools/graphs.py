"""Graphs of a bundle, run by onnxruntime and compared with the modules that they were traced from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from export.families import open_model
from export.families.family import Family
from export.sources.open import open_checkpoint


def opened(path: Path, **options: Any) -> Family:
    """The model of a checkpoint, before its weights are read."""
    return open_model(open_checkpoint(path, **options))


def sizes(height: int, width: int, batch: int, sequence: int) -> dict[str, int]:
    """Every dimension of a model of 8 pixels a latent: height and width are of the latents."""
    return {"batch": batch, "latent_height": height, "latent_width": width, "height": 8 * height, "width": 8 * width,
            "sequence": sequence}


def run(file: Path, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs of a graph by name. feed: inputs by name, among others."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    values = session.run(None, {value.name: feed[value.name] for value in session.get_inputs()})
    return dict(zip([value.name for value in session.get_outputs()], values, strict=True))


def run_in_order(file: Path, inputs: tuple[torch.Tensor, ...]) -> list[np.ndarray]:
    """Outputs of a graph, both in its order."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: x.numpy() for value, x in zip(session.get_inputs(), inputs, strict=True)})


def rel_rms(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))


def error(file: Path, name: str, model: Family, dims: Mapping[str, int]) -> float:
    """How far the graph of component `name` is from its module, of all outputs the furthest."""
    module = model.modules[name]()
    inputs = module.example(dims, seed=5)
    expected = module.run(inputs)
    return max(rel_rms(a, b.numpy()) for a, b in zip(run_in_order(file, inputs), expected, strict=True))
