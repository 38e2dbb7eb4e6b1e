"""Attention: latentrt's kernels beside scaled_dot_product_attention, each backend of it, and flex attention."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from benchmarks import cases
from benchmarks.harness.kernels.bench import Bench, Run, Setting, as_numpy, as_tensor, floor, random
from kernels.cpu import cpp
from kernels.triton import attention

SDPA_BACKENDS = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION",
                 "math": "MATH"}
"""Peer → name of torch's backend."""


def make(case: cases.Attention, dtype: str, setting: Setting) -> Bench:
    """Return the contenders at one shape."""
    shapes = [(case.batch, n, case.heads, case.head_dim) for n in (case.n_q, case.n_k, case.n_k)]
    q, k, v = (random(*shape, dtype=dtype, setting=setting, seed=i) for i, shape in enumerate(shapes))

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal).transpose(1, 2)

    def ours_on_cpu(isa: str) -> Run:
        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            heads_first = (as_numpy(t).transpose(0, 2, 1, 3) for t in (q, k, v))
            out = cpp.attention(*heads_first, causal=case.causal, threads=setting.threads, isa=isa)
            return as_tensor(out, dtype).transpose(1, 2)
        return run

    def truth(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = q.double(), k.double(), v.double()
        parts = (q,) if case.causal else q.split(1024, 1)  # the scores of all queries at once would take gigabytes
        return torch.cat([attention.reference(part, k, v, causal=case.causal) for part in parts], 1)

    if setting.device == "cuda":
        ours: dict[str, Run] = {"latentrt": functools.partial(torch.ops.latentrt.attention, causal=case.causal)}
        peers = {"torch": sdpa, **{name: _with_backend(sdpa, backend) for name, backend in SDPA_BACKENDS.items()}}
        if setting.compile and not case.causal:
            peers["compile"] = _flex()
    else:
        ours = {f"latentrt-{isa}": ours_on_cpu(isa) for isa in setting.isas}
        peers = {"torch": sdpa} | ({"compile": torch.compile(sdpa, dynamic=False)} if setting.compile else {})
    moved = 2 * (q.numel() + k.numel()) * q.element_size()
    return Bench("attention", str(case), dtype, (q, k, v), ours, peers, truth, moved, case.flops, floor(dtype, setting))


def _with_backend(sdpa: Run, name: str) -> Run:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(getattr(SDPBackend, name)):
            return sdpa(*inputs)
    return run


def _flex() -> Run:
    """torch.compile's own attention kernel; compiling scaled_dot_product_attention calls the eager one."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
