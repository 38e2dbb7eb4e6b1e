"""attention: the Triton kernel against its formula in float64, and the operator that torch sees."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks import cases
from kernels.triton import attention as op
from kernels.triton.checks import archs_of
from tests.cases.triton import DEVICE, DTYPES, check, poisoned, random

SMALL: dict[str, Any] = {  # batch, queries, keys, heads, head dim, causal
    "minimal": (1, 1, 1, 1, 16, False), "one-key": (2, 5, 1, 2, 40, False), "odd": (2, 19, 35, 3, 40, False),
    "blocks-of-both": (1, 150, 200, 2, 64, False), "exact-blocks": (1, 128, 128, 1, 32, False),
    "prompt": (2, 33, 77, 2, 40, False), "two-prompts": (1, 17, 154, 1, 80, False),
    "cross-frame": (1, 40, 80, 2, 48, False), "d160": (1, 64, 77, 2, 160, False), "d512": (1, 70, 70, 1, 512, False),
    "d24": (1, 9, 20, 2, 24, False), "d17": (1, 9, 20, 2, 17, False), "d256": (1, 20, 70, 1, 256, False),
    "causal-minimal": (1, 1, 1, 1, 16, True), "causal-text": (2, 77, 77, 2, 64, True),
    "causal-blocks": (1, 200, 200, 1, 32, True),
}


def inputs(batch: int, n_q: int, n_k: int, heads: int, head_dim: int,
           dtype: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (random(batch, n_q, heads, head_dim, dtype=dtype), random(batch, n_k, heads, head_dim, dtype=dtype, seed=1),
            random(batch, n_k, heads, head_dim, dtype=dtype, seed=2))


def framework(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None,
              causal: bool = False) -> torch.Tensor:
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads_first, scale=scale, is_causal=causal).transpose(1, 2)


def check_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None,
                 causal: bool = False) -> torch.Tensor:
    """Launch, compare with the truth, and give the result."""
    out = torch.full(q.shape, torch.nan, dtype=q.dtype, device=q.device)
    op.launch(q, k, v, out, scale=scale, causal=causal)
    truth = op.reference(q.double(), k.double(), v.double(), scale=scale, causal=causal)
    check(out, framework(q, k, v, scale, causal), truth)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SMALL)
def test_small(case: str, dtype: str) -> None:
    batch, n_q, n_k, heads, head_dim, causal = SMALL[case]
    check_kernel(*inputs(batch, n_q, n_k, heads, head_dim, dtype), causal=causal)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases.ATTENTION, ids=str)
def test_real(case: cases.Attention, dtype: str) -> None:
    check_kernel(*inputs(case.batch, case.n_q, case.n_k, case.heads, case.head_dim, dtype), causal=case.causal)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("case", [c for c in cases.ATTENTION if c.n_q * c.n_k <= 2**16 and c.model == "sd15"], ids=str)
def test_real_interpreted(case: cases.Attention, dtype: str) -> None:
    check_kernel(*inputs(case.batch, case.n_q, case.n_k, case.heads, case.head_dim, dtype), causal=case.causal)


@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
def test_scale(scale: float) -> None:
    """Scores of a hundred neither overflow nor lose the small ones."""
    check_kernel(*inputs(1, 20, 70, 2, 40, "fp32"), scale=scale)


def test_strides() -> None:
    """Views of one fused projection, of another order of dims, of longer buffers, and at addresses of no alignment."""
    fused = random(2, 40, 3, 2, 40, dtype="fp16")
    check_kernel(*fused.unbind(2))
    heads_first = random(3, 2, 2, 40, 40, dtype="fp16")
    check_kernel(*heads_first.transpose(2, 3))
    q, k, v = inputs(2, 40, 90, 3, 40, "fp16")
    k, v = (torch.nn.functional.pad(t, (0, 0, 0, 0, 0, 38), value=torch.nan)[:, :77] for t in (k[:, :77], v[:, :77]))
    check_kernel(q, k, v)  # what follows the last key in memory is not read
    odd = random(2, 40, 3, 2, 41, dtype="fp16")[..., 1:]
    check_kernel(*odd.unbind(2))


def test_one_head_takes_its_own_strides() -> None:
    q, k, v = inputs(1, 40, 40, 1, 64, "fp32")
    q, v = q.transpose(0, 2).expand(3, 40, 1, 64), v.expand(3, 40, 1, 64)  # strides of 0
    check_kernel(q, k.repeat(3, 1, 1, 1), v)


def test_rows_of_equal_scores() -> None:
    """The mean of v, for queries of zero and however many keys."""
    _, k, v = inputs(1, 5, 77, 1, 64, "fp32")
    out = poisoned(1, 5, 1, 64)
    op.launch(torch.zeros_like(out), k, v, out)
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(out), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mutation_fails(dtype: str) -> None:
    q, k, v = inputs(2, 33, 77, 2, 40, dtype)
    out = torch.full_like(q, torch.nan)
    op.launch(q, k, v, out)
    truth = op.reference(q.double(), k.double(), v.double())
    check(out, framework(q, k, v), truth)
    with pytest.raises(AssertionError, match="limit"):
        check(out * 1.01, framework(q, k, v), truth)
    op.launch(q, k[:, :-1], v[:, :-1], out)
    with pytest.raises(AssertionError, match="limit"):
        check(out, framework(q, k, v), truth)


def q(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "three-dims": ((q(1, 4, 64), q(1, 4, 64), q(1, 4, 64)), {}, ValueError, r"q: got shape .*, expected \[batch"),
    "dtypes-differ": ((q(1, 4, 2, 64), q(1, 4, 2, 64), q(1, 4, 2, 64, dtype=torch.float32)), {}, TypeError,
                      "v: got torch.float32, expected torch.float16"),
    "dtype": ((q(1, 4, 2, 64, dtype=torch.float64),) * 3, {}, TypeError, "q: got torch.float64, expected one of"),
    "heads-differ": ((q(1, 4, 2, 64), q(1, 4, 1, 64), q(1, 4, 2, 64)), {}, ValueError,
                     r"k: got shape \(1, 4, 1, 64\), expected \(1, 4, 2, 64\)"),
    "keys-differ": ((q(1, 4, 2, 64), q(1, 5, 2, 64), q(1, 4, 2, 64)), {}, ValueError, "v: got shape"),
    "head-dim": ((q(1, 4, 2, 8),) * 3, {}, ValueError, "head dim: got 8, expected 16 to 256, or 512"),
    "no-keys": ((q(1, 4, 2, 64), q(1, 0, 2, 64), q(1, 0, 2, 64)), {}, ValueError, "expected one of everything or more"),
    "layout": ((q(1, 4, 2, 64), q(1, 4, 64, 2).transpose(2, 3), q(1, 4, 2, 64)), {}, ValueError,
               "k: got strides .*, expected the head dim to be contiguous"),
    "scale": ((q(1, 4, 2, 64),) * 3, {"scale": -1.0}, ValueError, "scale: got -1.0, expected a positive number"),
    "causal": ((q(1, 4, 2, 64), q(1, 5, 2, 64), q(1, 5, 2, 64)), {"causal": True}, ValueError,
               "causal: got 4 queries and 5 keys"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    args, options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        torch.ops.latentrt.attention(*args, **options)
    with pytest.raises(error, match=message):
        op.launch(args[0], args[1], args[2], poisoned(*args[0].shape, dtype="fp16"), **options)


@pytest.mark.parametrize(("out", "error", "message"), [
    (q(1, 4, 2, 40), ValueError, "out: got shape"),
    (q(1, 4, 2, 64, dtype=torch.float32), TypeError, "out: got torch.float32, expected torch.float16"),
    (q(1, 4, 64, 2).transpose(2, 3), ValueError, "out: .* expected a contiguous tensor"),
    (torch.empty(1, 4, 2, 64, dtype=torch.float16, device="meta"), ValueError, "out: got a tensor on meta, expected"),
], ids=["shape", "dtype", "layout", "device"])
def test_refused_outputs(out: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        op.launch(q(1, 4, 2, 64), q(1, 4, 2, 64), q(1, 4, 2, 64), out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_launched_is_built(dtype: str) -> None:
    built = {variant.name: variant for variant in op.variants()}
    for case in cases.ATTENTION:
        for arch in archs_of(dtype):
            cfg = op.config(case.batch, case.heads, case.n_q, case.n_k, case.head_dim, dtype, arch)
            variant = built[cfg.name(dtype, case.head_dim, case.causal)]
            assert arch in variant.archs
            assert variant.constants["BLOCK_M"] == cfg.block_m and variant.num_warps == cfg.num_warps
            assert set(variant.signature) | set(variant.constants) == set(variant.kernel.arg_names)


@pytest.mark.parametrize(("head_dim", "parts"), [(16, (16, 0)), (40, (32, 16)), (64, (64, 0)), (80, (64, 16)),
                                                 (96, (64, 32)), (160, (128, 32)), (512, (512, 0))])
def test_head_dims_are_split_without_padding_to_a_power_of_two(head_dim: int, parts: tuple[int, int]) -> None:
    constants = op._constants(op.config(1, 1, 64, 64, head_dim, "fp16", 90), head_dim, 8, False)
    assert (constants["MAIN"], constants["REST"]) == parts


def test_the_operator_is_what_torch_expects() -> None:
    fused = random(2, 9, 3, 2, 40)
    torch.library.opcheck(torch.ops.latentrt.attention.default, fused.unbind(2), {"scale": 0.2, "causal": True})
    result = torch.ops.latentrt.attention(*fused.unbind(2), scale=0.2, causal=True)
    q, k, v = fused.unbind(2)
    torch.testing.assert_close(result, framework(q, k, v, scale=0.2, causal=True), rtol=1e-5, atol=1e-5)


def test_export_sees_one_node() -> None:
    class Block(torch.nn.Module):
        def forward(self, qkv: torch.Tensor) -> torch.Tensor:
            return torch.ops.latentrt.attention(*qkv.unbind(2), scale=1 / math.sqrt(40)).flatten(2)

    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(Block(), (random(2, 9, 3, 2, 40),), dynamic_shapes=({1: tokens},))
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert calls.count(torch.ops.latentrt.attention.default) == 1
    assert not [call for call in calls if "softmax" in str(call) or "matmul" in str(call)]
    fused = random(2, 20, 3, 2, 40, seed=3)
    torch.testing.assert_close(program.module()(fused), framework(*fused.unbind(2)).flatten(2), rtol=1e-5, atol=1e-5)
