"""Compilers see our operators so: torch.export as one node, whoever compiles its program as the kernels.

So a package that AOTInductor writes holds the kernels compiled, and needs neither Triton nor Python to launch them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton


def traceable(kernel: Any, out: torch.Tensor) -> Any:
    """Return `kernel`; or, where a graph is traced and `out` has no memory, what puts its launch into that graph."""
    if type(out) is torch.Tensor or not isinstance(kernel, triton.JITFunction):
        return kernel
    return torch.library.wrap_triton(kernel)


def open_on_gpu(op: Any, on_gpu: Callable[..., torch.Tensor]) -> None:
    """Let compilers trace `on_gpu` for custom op `op` on CUDA tensors; torch.export keeps the op whole.

    This is what torch.library.triton_op does, but for one device, and with the op's own schema.
    """
    from torch._subclasses.functional_tensor import FunctionalTensorMode
    from torch.export._trace import custom_triton_ops_decomposition_disabled

    @op.register_torch_dispatch(FunctionalTensorMode)
    def _(mode: Any, function: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args[0].device.type != "cuda" or custom_triton_ops_decomposition_disabled():
            return mode.__torch_dispatch__(function, types, args, kwargs)
        with mode:
            return on_gpu(*args, **kwargs)
