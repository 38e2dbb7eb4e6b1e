"""Linear layers in float8 (e4m3: 3 bits of mantissa, up to 448), for GPUs that multiply it: Ada, Hopper and later.

    y = (q_x · q_wᵀ) s_x s_w + b        q = round(x / s) in float8_e4m3fn        s = max|x| / 448, of a row

A row of x is a token, one of w an output channel: a large value costs its own row accuracy and no other. Scales are
float32, and so is the sum. Weights are quantised when they are written (`weights.Weight`), activations at every call.
Bytes moved: a weight is half of what it is in 16 bits; x is read once more, for its scales, unless the compiler joins
that to what computes x.

This is "per-channel, per-token" dynamic quantisation (Micikevicius et al., "FP8 formats for deep learning", 2022, for
the format). None of it has run on a GPU yet.
"""

from __future__ import annotations

import torch

LARGEST = 448.0
"""The largest finite value of e4m3."""
STEP = 16
"""Inputs and outputs come in multiples of this (`torch._scaled_mm`)."""


def fits(rows: int, inputs: int, outputs: int, least: int) -> bool:
    """Return whether the product of x [rows, inputs] and a weight [outputs, inputs] is computed in float8."""
    return min(rows, inputs, outputs) >= least and inputs % STEP == 0 and outputs % STEP == 0


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x [..., n] as float8_e4m3fn [..., n] and float32 scales [..., 1]; a row of zeros stays that."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (x / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def linear(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the product of x [..., inputs] and a quantised weight [outputs, inputs], bfloat16 [..., outputs].

    scales: float32 [1, outputs], of the weight. bfloat16 is the one dtype that every architecture and version of
    PyTorch gives for scales of rows; its rounding is a sixteenth of that of x. x is copied where its rows are not
    contiguous, as those of channels-first pictures. PyTorch widens to float32 on CPUs: the same numbers, for checking,
    at no gain.
    """
    flat, scale = quantise(x.reshape(-1, x.shape[-1]))
    y = torch._scaled_mm(flat.contiguous(), weight.t(), scale_a=scale, scale_b=scales, out_dtype=torch.bfloat16,
                         use_fast_accum=False)  # the fast sum keeps fewer bits than float32
    return y.unflatten(0, x.shape[:-1])
