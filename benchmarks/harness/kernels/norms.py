"""Group norm with SiLU and layer norm: latentrt's kernels beside torch's."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import cases
from benchmarks.harness.kernels.bench import Bench, Run, Setting, as_numpy, as_tensor, floor, peers, random
from kernels.cpu import cpp
from kernels.triton import group_norm, layer_norm


def make_group_norm(case: cases.GroupNorm, dtype: str, setting: Setting) -> Bench:
    """Return the contenders at one shape."""
    shape = (case.images, case.channels, case.height, case.width)
    x = random(*shape, dtype=dtype, setting=setting, channels_last=setting.channels_last)
    weight, bias = (random(case.channels, dtype=dtype, setting=setting, seed=seed) for seed in (1, 2))

    def eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        y = F.group_norm(x, case.groups, weight, bias, case.eps)
        return F.silu(y) if case.silu else y

    def ours_on_gpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.ops.latentrt.group_norm(x, weight, bias, case.groups, case.eps, case.silu)

    def ours_on_cpu(isa: str) -> Run:
        wide = [t.float().numpy() for t in (weight, bias)]  # as an engine keeps them

        def run(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            array = as_numpy(x)
            out = cpp.group_norm(np.moveaxis(array, 1, -1) if setting.channels_last else array, case.groups, *wide,
                                 eps=case.eps, silu=case.silu, channels_last=setting.channels_last,
                                 threads=setting.threads, isa=isa)
            return as_tensor(out, dtype).movedim(-1, 1) if setting.channels_last else as_tensor(out, dtype)
        return run

    def truth(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        size = case.channels // case.groups * max(1, case.groups // 8)  # an eighth of the groups at a time
        parts = zip(x.split(size, 1), weight.double().split(size), bias.double().split(size), strict=True)
        return torch.cat([group_norm.reference(part.double(), w, b, w.numel() * case.groups // case.channels, case.eps,
                                               case.silu) for part, w, b in parts], 1)

    on_gpu = setting.device == "cuda"
    ours = {"latentrt": ours_on_gpu} if on_gpu else {f"latentrt-{isa}": ours_on_cpu(isa) for isa in setting.isas}
    return Bench("group_norm", str(case), dtype, (x, weight, bias), ours, peers(eager, setting), truth,
                 2 * x.numel() * x.element_size(), 0, floor(dtype, setting))


def make_layer_norm(case: cases.LayerNorm, dtype: str, setting: Setting) -> Bench:
    """Return the contenders at one shape."""
    x = random(case.rows, case.n, dtype=dtype, setting=setting)
    weight, bias = (random(case.n, dtype=dtype, setting=setting, seed=seed) for seed in (1, 2))
    return Bench("layer_norm", str(case), dtype, (x, weight, bias),
                 {"latentrt": lambda x, weight, bias: torch.ops.latentrt.layer_norm(x, weight, bias, 1e-5)},
                 peers(lambda x, weight, bias: F.layer_norm(x, (case.n,), weight, bias, 1e-5), setting),
                 lambda x, weight, bias: layer_norm.reference(x.double(), weight.double(), bias.double(), 1e-5),
                 2 * x.numel() * x.element_size(), 0, floor(dtype, setting))
