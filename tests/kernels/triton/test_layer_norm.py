"""layer_norm: the Triton kernel against its formula in float64, and the operator that torch sees."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cases
from kernels.triton import layer_norm as op
from tests.cases.triton import DEVICE, DTYPES, check, poisoned, random

SMALL = {"minimal": (1, 1), "odd": (7, 37), "sd15": (33, 320), "exact": (4, 1024), "batch": (2, 5, 640),
         "vector": (768,), "long": (2, 5000)}


def inputs(shape: tuple[int, ...], dtype: str,
           weights: str | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = (random(*shape) * 2 + 3).to(DTYPES[dtype])
    return x, random(shape[-1], dtype=weights or dtype, seed=1), random(shape[-1], dtype=weights or dtype, seed=2)


def framework(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def check_kernel(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Launch, compare with the truth, and give the result."""
    out = torch.full_like(x, torch.nan)
    op.launch(x, weight, bias, out, eps)
    truth = op.reference(x.double(), weight.double(), bias.double(), eps)
    check(out, framework(x, weight, bias, eps), truth)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SMALL)
def test_small(case: str, dtype: str) -> None:
    check_kernel(*inputs(SMALL[case], dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases.LAYER_NORM, ids=str)
def test_real(case: cases.LayerNorm, dtype: str) -> None:
    check_kernel(*inputs((case.rows, case.n), dtype))


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in cases.LAYER_NORM if c.rows * c.n <= 200_000], ids=str)
def test_real_interpreted(case: cases.LayerNorm) -> None:
    check_kernel(*inputs((case.rows, case.n), "bf16"))


def test_weights_in_fp32_and_eps() -> None:
    check_kernel(*inputs((9, 320), "fp16", weights="fp32"), eps=0.5)


def test_large_mean() -> None:
    """A mean of 2000 deviations: E[x²] − E[x]² in fp32 would have no correct digit left."""
    x, weight, bias = inputs((9, 320), "fp32")
    x += 4000
    out = torch.full_like(x, torch.nan)
    op.launch(x, weight, bias, out, 1e-5)
    assert (out - op.reference(x.double(), weight.double(), bias.double(), 1e-5)).abs().max() < 2e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mutation_fails(dtype: str) -> None:
    x, weight, bias = inputs((9, 320), dtype)
    out = check_kernel(x, weight, bias)
    truth = op.reference(x.double(), weight.double(), bias.double(), 1e-5)
    with pytest.raises(AssertionError, match="limit"):
        check(out * 1.01, framework(x, weight, bias, 1e-5), truth)
    op.launch(x, weight, bias, out, 0.2)
    with pytest.raises(AssertionError, match="limit"):
        check(out, framework(x, weight, bias, 1e-5), truth)


def x(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


REFUSED = {
    "weight-shape": ((x(4, 10), x(9), x(10)), ValueError, r"weight: got shape \(9,\), expected \(10,\)"),
    "weight-dtype": ((x(4, 10), x(10, dtype=torch.bfloat16), x(10, dtype=torch.bfloat16)), TypeError,
                     "weight: got torch.bfloat16, expected torch.float16, as x, or torch.float32"),
    "dtype": ((x(4, 10, dtype=torch.int32), x(10), x(10)), TypeError, "x: got torch.int32, expected one of"),
    "layout": ((x(10, 4).T, x(10), x(10)), ValueError, "x: .* expected a contiguous tensor"),
    "empty": ((x(0, 10), x(10), x(10)), ValueError, "at least one row"),
    "too-long": ((x(1, 16385), x(16385), x(16385)), ValueError, "1 to 16384 values"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    args, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        torch.ops.latentrt.layer_norm(*args, 1e-5)
    with pytest.raises(error, match=message):
        op.launch(*args, torch.empty_like(args[0]), 1e-5)


def test_an_output_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"out: got shape \(5, 10\), expected \(4, 10\)"):
        op.launch(x(4, 10), x(10), x(10), poisoned(5, 10, dtype="fp16"), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_launched_is_built(dtype: str) -> None:
    built = {variant.name: variant for variant in op.variants()}
    for case in cases.LAYER_NORM:
        variant = built[op.config(case.n).name(dtype)]
        assert variant.constants == {"ROWS": op.config(case.n).rows, "WIDE": op.config(case.n).wide}
        assert case.n % 16 == 0  # as the variant promises


def test_the_operator_is_what_torch_expects() -> None:
    args = (*inputs((2, 5, 40), "fp32"), 1e-5)
    torch.library.opcheck(torch.ops.latentrt.layer_norm.default, args)
    torch.testing.assert_close(torch.ops.latentrt.layer_norm(*args), framework(*args), rtol=1e-5, atol=1e-5)


def test_export_sees_one_node() -> None:
    _, weight, bias = inputs((40,), "fp32")

    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.latentrt.layer_norm(x * 2, weight, bias, 1e-5) + x

    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(Block(), (random(5, 40),), dynamic_shapes=({0: rows},))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls.count("latentrt.layer_norm.default") == 1
    assert not [call for call in calls if "var" in call]
    longer = random(11, 40, seed=3)
    torch.testing.assert_close(program.module()(longer), framework(longer * 2, weight, bias, 1e-5) + longer,
                               rtol=1e-5, atol=1e-5)
