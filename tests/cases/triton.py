"""What the tests of the Triton kernels share: where they run, how error is judged, and repairs to the interpreter.

Without a GPU the kernels run on CPU tensors in Triton's interpreter (tests/conftest.py turns it on); with one the same
cases run there, compiled.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter

from benchmarks.cases import TRITON_FLOOR, most_error
from tests.conftest import why_no_gpu

DEVICE = "cpu" if why_no_gpu() else "cuda"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def random(*shape: int, dtype: str = "fp32", seed: int = 0) -> torch.Tensor:
    """Standard normal values, rounded to `dtype`; the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DTYPES[dtype]).to(DEVICE)


def poisoned(*shape: int, dtype: str = "fp32") -> torch.Tensor:
    """An output that shows what was not written."""
    return torch.full(shape, torch.nan, dtype=DTYPES[dtype], device=DEVICE)


def check(got: torch.Tensor, framework: torch.Tensor, truth: torch.Tensor) -> None:
    """`got` against `truth` in float64, its error against that of `framework`, torch's own result in got's dtype."""
    assert got.dtype == framework.dtype and truth.dtype == torch.float64
    assert got.shape == framework.shape == truth.shape
    assert torch.isfinite(got).all(), f"{int((~torch.isfinite(got)).sum())} of {got.numel()} values are not finite"
    floor = TRITON_FLOOR[{dtype: name for name, dtype in DTYPES.items()}[got.dtype]]
    ours, theirs = (got.double() - truth).abs(), (framework.double() - truth).abs()
    for measure in (lambda t: t.square().mean().sqrt().item(), lambda t: t.abs().max().item()):
        limit = most_error(measure(theirs), measure(truth), floor)
        assert measure(ours) <= limit, f"error {measure(ours):.3g}, framework {measure(theirs):.3g}, limit {limit:.3g}"


def _repair_interpreter() -> None:
    """Three faults of the interpreter in Triton 3.6, none of the compiler.

    Loop bounds that are tensors are turned into an int in a way that numpy 2.4 refuses (mended after 3.6); tl.dot
    multiplies the bit patterns of bf16; and fp32 is truncated to bf16 where the GPU rounds to nearest.
    """
    patch_tensor, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot
    convert = interpreter._convert_float

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def dot_of_bf16(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (self.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return dot(self, a, b, *rest)

    def convert_rounding(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(data.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
        return convert(data, source, target, rounding)

    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter.InterpreterBuilder.create_dot = dot_of_bf16
    interpreter._convert_float = convert_rounding


_repair_interpreter()
