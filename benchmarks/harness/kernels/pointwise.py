"""GEGLU and the conversion to pictures: latentrt's kernels beside torch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks import cases
from benchmarks.harness.kernels.bench import Bench, Setting, floor, peers, random
from kernels.triton import geglu, to_image


def make_geglu(case: cases.Geglu, dtype: str, setting: Setting) -> Bench:
    """Return the contenders at one shape."""
    x = random(case.rows, 2 * case.n, dtype=dtype, setting=setting)

    def eager(x: torch.Tensor) -> torch.Tensor:
        value, gate = x.chunk(2, -1)
        return value * F.gelu(gate)

    return Bench("geglu", str(case), dtype, (x,), {"latentrt": torch.ops.latentrt.geglu}, peers(eager, setting),
                 lambda x: geglu.reference(x.double()), 3 * case.rows * case.n * x.element_size(), 0,
                 floor(dtype, setting))


def make_to_image(case: cases.Pictures, dtype: str, setting: Setting) -> Bench:
    """Return the contenders at one shape. Bytes must be equal, so there is no floor."""
    x = random(case.images, 3, case.height, case.width, dtype=dtype, setting=setting,
               channels_last=setting.channels_last)

    def eager(x: torch.Tensor) -> torch.Tensor:
        unit = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float()
        return (unit * 255).round().to(torch.uint8).contiguous()

    return Bench("to_image", str(case), dtype, (x,), {"latentrt": torch.ops.latentrt.to_image}, peers(eager, setting),
                 to_image.reference, x.numel() * (x.element_size() + 1), 0, 0.0)
