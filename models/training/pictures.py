"""Pictures: drawn scenes as tensors, and tensors as pictures."""

from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.world import drawing
from models.world.layouts import sample_layout
from models.world.scenes import Layout


def draw_scenes(rng: Random, n: int) -> tuple[list[Layout], Tensor]:
    """Return `n` seen scenes and their pictures, float [n, 3, 64, 64] in -1..1."""
    layouts = [sample_layout(rng) for _ in range(n)]
    return layouts, to_tensor(drawing.draw(layouts))


def to_tensor(images: np.ndarray) -> Tensor:
    """Return float [n, 3, 64, 64] in -1..1 for uint8 [n, 64, 64, 3]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(x: Tensor) -> np.ndarray:
    """Return uint8 [n, 64, 64, 3] for float [n, 3, 64, 64] in -1..1."""
    return ((x.float().cpu() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def save_grid(images: np.ndarray, path: Path, columns: int = 8) -> None:
    """Write pictures, uint8 [n, h, w, 3], as full rows of one picture, twice their size."""
    rows = len(images) // columns
    grid = images[: rows * columns].reshape(rows, columns, *images.shape[1:]).transpose(0, 2, 1, 3, 4)
    picture = Image.fromarray(grid.reshape(rows * images.shape[1], columns * images.shape[2], 3))
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path)
