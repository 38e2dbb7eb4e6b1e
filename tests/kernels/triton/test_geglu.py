"""geglu: the Triton kernel against its formula in float64, diffusers' module, and the operator that torch sees."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cases
from kernels.triton import geglu as op
from tests.cases.triton import DEVICE, DTYPES, check, poisoned, random

SMALL = {"minimal": (1, 2), "odd": (7, 74), "sd15": (11, 2560), "one-tile": (8, 512), "batch": (2, 5, 600),
         "vector": (20,)}


def inputs(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    return (random(*shape) * 2).to(DTYPES[dtype])


def framework(x: torch.Tensor) -> torch.Tensor:
    value, gate = x.chunk(2, -1)
    return value * torch.nn.functional.gelu(gate)


def check_kernel(x: torch.Tensor) -> torch.Tensor:
    """Launch, compare with the truth, and give the result."""
    out = torch.full((*x.shape[:-1], x.shape[-1] // 2), torch.nan, dtype=x.dtype, device=x.device)
    op.launch(x, out)
    check(out, framework(x), op.reference(x.double()))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SMALL)
def test_small(case: str, dtype: str) -> None:
    check_kernel(inputs(SMALL[case], dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases.GEGLU, ids=str)
def test_real(case: cases.Geglu, dtype: str) -> None:
    check_kernel(inputs((case.rows, 2 * case.n), dtype))


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in cases.GEGLU if c.rows * c.n <= 700_000], ids=str)
def test_real_interpreted(case: cases.Geglu) -> None:
    check_kernel(inputs((case.rows, 2 * case.n), "bf16"))


def test_is_the_module_of_diffusers() -> None:
    """The same order of value and gate, and the same exact GELU."""
    activations = pytest.importorskip("diffusers.models.activations")
    module = activations.GEGLU(12, 20).to(DEVICE)
    x = random(3, 12)
    out = poisoned(3, 20)
    op.launch(module.proj(x).detach(), out)
    torch.testing.assert_close(out, module(x).detach(), rtol=1e-5, atol=1e-6)


def test_extremes() -> None:
    """Gates of ±40 pass or stop the value entirely."""
    gates = torch.tensor([-40.0, -8.0, 0.0, 8.0, 40.0], device=DEVICE)
    out = poisoned(1, 5)
    op.launch(torch.cat([torch.full_like(gates, 2.5), gates])[None], out)
    torch.testing.assert_close(out[0], 2.5 * torch.nn.functional.gelu(gates), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mutation_fails(dtype: str) -> None:
    x = inputs((7, 74), dtype)
    out = check_kernel(x)
    with pytest.raises(AssertionError, match="limit"):
        check(out * 1.01, framework(x), op.reference(x.double()))
    op.launch(torch.cat(x.chunk(2, -1)[::-1], -1), out)
    with pytest.raises(AssertionError, match="limit"):
        check(out, framework(x), op.reference(x.double()))


def x(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


REFUSED = {
    "odd-width": (x(4, 11), ValueError, r"x: got shape \(4, 11\), expected at least one row of an even number"),
    "dtype": (x(4, 10, dtype=torch.float64), TypeError, "x: got torch.float64, expected one of"),
    "layout": (x(10, 4).T, ValueError, "x: .* expected a contiguous tensor"),
    "empty": (x(0, 10), ValueError, "at least one row"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    arg, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        torch.ops.latentrt.geglu(arg)
    with pytest.raises(error, match=message):
        op.launch(arg, poisoned(4, 5, dtype="fp16"))


def test_an_output_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"out: got shape \(4, 10\), expected \(4, 5\)"):
        op.launch(x(4, 10), poisoned(4, 10, dtype="fp16"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_launched_is_built(dtype: str) -> None:
    built = {variant.name: variant for variant in op.variants()}
    assert built[f"geglu_{dtype}"].constants == {"ROWS": op.ROWS, "WIDE": op.WIDE}
    assert all(case.n % op.WIDE == 0 for case in cases.GEGLU)


def test_the_operator_is_what_torch_expects() -> None:
    arg = inputs((2, 5, 40), "fp32")
    torch.library.opcheck(torch.ops.latentrt.geglu.default, (arg,))
    torch.testing.assert_close(torch.ops.latentrt.geglu(arg), framework(arg), rtol=1e-5, atol=1e-5)


def test_export_sees_one_node() -> None:
    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.latentrt.geglu(x * 2) + 1

    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(Block(), (inputs((5, 40), "fp32"),), dynamic_shapes=({0: rows},))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls.count("latentrt.geglu.default") == 1
    assert not [call for call in calls if "erf" in call or "gelu" in call]
    longer = random(11, 40, seed=3)
    torch.testing.assert_close(program.module()(longer), framework(longer * 2) + 1, rtol=1e-5, atol=1e-5)
