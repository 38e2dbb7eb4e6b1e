"""Operations of known functions and models, which floors follow from."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.harness import limits
from export.sources.architectures import CONFIGS


def test_operations_of_known_functions() -> None:
    x = torch.empty(7, 3, device="meta")
    assert limits.count(torch.nn.Linear(3, 5, device="meta"), x) == 2 * 7 * 3 * 5
    conv = torch.nn.Conv2d(3, 4, 3, padding=1, device="meta")
    assert limits.count(conv, torch.empty(2, 3, 8, 9, device="meta")) == 2 * 2 * 8 * 9 * 4 * 3 * 3 * 3
    q, k = torch.empty(2, 4, 10, 16, device="meta"), torch.empty(2, 4, 12, 16, device="meta")
    assert limits.count(F.scaled_dot_product_attention, q, k, k) == 2 * 2 * 2 * 4 * 10 * 12 * 16


def test_operations_of_stable_diffusion(tmp_path: Path) -> None:
    """1.6065 TFLOP for a step with guidance and 2.5145 for a picture's decoding, at 512x512 pixels."""
    config = json.loads((CONFIGS / "sd1.json").read_text())
    for name in ("unet", "vae", "text_encoder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config[name]))
    assert limits.unet_flops(tmp_path, 2, 64, 64) == 1_606_546_882_560
    assert limits.vae_decoder_flops(tmp_path, 1, 64, 64) == 2_514_518_933_504
    assert round(limits.text_encoder_flops(tmp_path, 2) / 1e12, 4) == 0.0266
