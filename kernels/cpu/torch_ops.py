"""The C++ kernels as torch operators on CPU tensors: latentrt::cpu_attention and latentrt::cpu_group_norm.

They take and give what latentrt::attention and latentrt::group_norm do, and need torch but not Triton.
"""

from __future__ import annotations

import numpy as np
import torch

from kernels.cpu import cpp


@torch.library.custom_op("latentrt::cpu_attention", mutates_args=(), device_types="cpu",
                         schema="(Tensor q, Tensor k, Tensor v, *, float? scale=None, bool causal=False) -> Tensor")
def cpu_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None,
                  causal: bool = False) -> torch.Tensor:
    """Compute softmax(scale · q kᵀ) v: q [B, N_q, H, D], k and v [B, N_k, H, D] → [B, N_q, H, D], contiguous.

    fp32 or bf16, all three alike; any strides whose last is 1; a D that 8 divides, up to 1024. Raises ValueError for
    the rest, CpuKernelError where the C++ kernels are missing.
    """
    out = torch.empty(q.shape, dtype=q.dtype)
    cpp.attention(*(_array(x).transpose(0, 2, 1, 3) for x in (q, k, v, out)), scale=scale, causal=causal,
                  threads=torch.get_num_threads())
    return out


@cpu_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None,
      causal: bool = False) -> torch.Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("latentrt::cpu_group_norm", mutates_args=(), device_types="cpu")
def cpu_group_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float,
                   silu: bool = False) -> torch.Tensor:
    """Compute the group norm of x [images, channels, …], then SiLU where asked for; the result has x's strides.

    fp32, bf16 or fp16; contiguous in channels-first or channels-last memory. Raises ValueError for the rest,
    CpuKernelError where the C++ kernels are missing.
    """
    out = torch.empty_like(x)
    last = not x.is_contiguous()
    arrays = (_array(t.movedim(1, -1) if last else t) for t in (x, out))
    cpp.group_norm(next(arrays), groups, _array(weight), _array(bias), next(arrays), eps=eps, silu=silu,
                   channels_last=last, threads=torch.get_num_threads())
    return out


@cpu_group_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float,
      silu: bool = False) -> torch.Tensor:
    return torch.empty_like(x)


def _array(x: torch.Tensor) -> np.ndarray:
    """Return the same memory for numpy, which has no bfloat16: its bits."""
    return x.detach().view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.detach().numpy()
