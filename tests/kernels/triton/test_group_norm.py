"""group_norm: the Triton kernels against their formula in float64, and the operator that torch sees."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cases
from kernels.triton import group_norm as op
from tests.cases.triton import DEVICE, DTYPES, check, random

SMALL = {  # shape, groups; those that do not fit in registers are split
    "minimal": ((1, 1, 1, 1), 1), "one-position": ((2, 32, 1, 1), 4), "odd": ((3, 15, 5, 7), 5),
    "no-image": ((2, 12), 3), "sd15-8x8": ((1, 320, 8, 8), 32), "shapes": ((2, 192, 4, 4), 16),
    "one-group": ((2, 40, 9, 3), 1),
    "split": ((1, 4, 37, 30), 1), "split-odd": ((2, 40, 23, 13), 2), "split-slabs": ((1, 192, 18, 15), 8),
    "split-1d": ((1, 6, 1100), 2), "split-wide": ((1, 140, 5, 5), 1),
}
WHOLE = {"minimal", "one-position", "odd", "no-image", "sd15-8x8", "shapes", "one-group"}
LAYOUTS = {"nchw": False, "nhwc": True}


def inputs(shape: tuple[int, ...], channels_last: bool, dtype: str,
           weights: str | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x around 3, in the memory order asked for, with weight and bias."""
    x = (random(*shape) * 2 + 3).to(DTYPES[dtype])
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x, random(shape[1], dtype=weights or dtype, seed=1), random(shape[1], dtype=weights or dtype, seed=2)


def framework(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float,
              silu: bool) -> torch.Tensor:
    """torch's own two ops, channels-first, where they are the most accurate."""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    y = torch.group_norm(x.contiguous(), groups, weight, bias, eps)
    return torch.nn.functional.silu(y) if silu else y


def check_kernel(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float,
                 silu: bool) -> torch.Tensor:
    """Launch, compare with the truth, and give the result."""
    out = torch.full_like(x, torch.nan)
    op.launch(x, weight, bias, out, groups, eps, silu)
    check(out, framework(x, weight, bias, groups, eps, silu),
          op.reference(x.double(), weight.double(), bias.double(), groups, eps, silu))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SMALL)
def test_small(case: str, layout: str, dtype: str) -> None:
    shape, groups = SMALL[case]
    x, weight, bias = inputs(shape, LAYOUTS[layout], dtype)
    fits = op.whole_config(x[0, 0].numel(), shape[1] // groups, LAYOUTS[layout]) is not None
    assert fits == (case in WHOLE)
    check_kernel(x, weight, bias, groups, 1e-5, silu=layout == "nchw")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [case for case in SMALL if case not in WHOLE])
def test_chunks_of_several_tiles(case: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an image so large that there are fewer programs than tiles."""
    monkeypatch.setattr(op, "PROGRAMS", 4)
    monkeypatch.setattr(op, "TILE", 1024)
    shape, groups = SMALL[case]
    check_kernel(*inputs(shape, LAYOUTS[layout], "fp32"), groups, 1e-5, silu=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", cases.GROUP_NORM, ids=str)
def test_real(case: cases.GroupNorm, layout: str, dtype: str) -> None:
    shape = (case.images, case.channels, case.height, case.width)
    check_kernel(*inputs(shape, LAYOUTS[layout], dtype), case.groups, case.eps, case.silu)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [c for c in cases.GROUP_NORM if c.values <= 700_000], ids=str)
def test_real_interpreted(case: cases.GroupNorm, layout: str) -> None:
    shape = (case.images, case.channels, case.height, case.width)
    check_kernel(*inputs(shape, LAYOUTS[layout], "fp16"), case.groups, case.eps, case.silu)


@pytest.mark.parametrize("silu", [False, True], ids=["plain", "silu"])
@pytest.mark.parametrize("case", ["odd", "split-odd"])
def test_silu_and_weights_in_fp32(case: str, silu: bool) -> None:
    shape, groups = SMALL[case]
    check_kernel(*inputs(shape, True, "fp16", weights="fp32"), groups, 1e-6, silu)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["sd15-8x8", "split"])
def test_large_mean(case: str, layout: str) -> None:
    """A mean of 2000 deviations: E[x²] − E[x]² in fp32 would have no correct digit left."""
    shape, groups = SMALL[case]
    x, weight, bias = inputs(shape, LAYOUTS[layout], "fp32")
    x += 4000
    out = torch.full_like(x, torch.nan)
    op.launch(x, weight, bias, out, groups, 1e-5)
    truth = op.reference(x.double(), weight.double(), bias.double(), groups, 1e-5)
    assert (out - truth).abs().max() < 2e-3
    wide = x.reshape(shape[0], groups, -1)
    naive = wide.square().mean(-1) - wide.mean(-1).square()
    assert ((naive - wide.double().var(-1, correction=0)).abs() > 0.1).any()


def test_a_constant_image_becomes_the_bias() -> None:
    x = torch.full((1, 4, 37, 30), 7.25, device=DEVICE)
    _, weight, bias = inputs((1, 4), False, "fp32")
    out = torch.full_like(x, torch.nan)
    op.launch(x, weight, bias, out, 1, 1e-5)
    torch.testing.assert_close(out, bias.reshape(1, -1, 1, 1).expand_as(out), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["odd", "split"])
def test_a_mutation_fails(case: str, dtype: str) -> None:
    shape, groups = SMALL[case]
    x, weight, bias = inputs(shape, True, dtype)
    out = check_kernel(x, weight, bias, groups, 1e-5, True)
    truth = op.reference(x.double(), weight.double(), bias.double(), groups, 1e-5, True)
    with pytest.raises(AssertionError, match="limit"):
        check(out * 1.01, framework(x, weight, bias, groups, 1e-5, True), truth)
    op.launch(x, weight, bias, out, groups, 0.2, True)
    with pytest.raises(AssertionError, match="limit"):
        check(out, framework(x, weight, bias, groups, 1e-5, True), truth)


def x(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


REFUSED = {
    "groups": ((x(1, 10, 4, 4), x(10), x(10), 4), ValueError, "groups: got 4, expected a divisor of the 10 channels"),
    "weight-shape": ((x(1, 10, 4, 4), x(9), x(10), 5), ValueError, r"weight: got shape \(9,\), expected \(10,\)"),
    "weight-dtype": ((x(1, 10, 4, 4), x(10, dtype=torch.bfloat16), x(10, dtype=torch.bfloat16), 5), TypeError,
                     "weight: got torch.bfloat16, expected torch.float16, as x, or torch.float32"),
    "bias-dtype": ((x(1, 10, 4, 4), x(10), x(10, dtype=torch.float32), 5), TypeError, "bias: got torch.float32"),
    "dtype": ((x(1, 10, 4, 4, dtype=torch.float64), x(10), x(10), 5), TypeError, "x: got torch.float64"),
    "layout": ((x(1, 10, 4, 8)[..., ::2], x(10), x(10), 5), ValueError, "x: got shape .* with strides .* without gaps"),
    "weight-layout": ((x(1, 10, 4, 4), x(20)[::2], x(10), 5), ValueError, "weight: .* expected a contiguous tensor"),
    "empty": ((x(0, 10, 4, 4), x(10), x(10), 5), ValueError, "at least one value"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    args, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        torch.ops.latentrt.group_norm(*args, 1e-5)
    with pytest.raises(error, match=message):
        op.launch(*args[:3], torch.empty_like(args[0]), args[3], 1e-5)


def test_an_output_of_another_layout_is_refused() -> None:
    inp, weight, bias = inputs((2, 8, 3, 5), True, "fp16")
    with pytest.raises(ValueError, match=r"out: got strides .* make it with torch\.empty_like"):
        op.launch(inp, weight, bias, inp.contiguous(), 4, 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_launched_is_built(dtype: str, layout: str) -> None:
    built = {variant.name: variant for variant in op.variants()}
    last = LAYOUTS[layout]
    for case in cases.GROUP_NORM:
        positions, per_group = case.height * case.width, case.channels // case.groups
        if whole := op.whole_config(positions, per_group, last):
            launched = {"whole": whole}
        else:
            run, members = (positions, per_group) if last else (positions * per_group, 1)
            launched = {"statistics": op.split_config(case.images, run, case.groups * members, members, last),
                        "normalise": op.split_config(case.images, positions, case.channels, per_group, last)}
        for kind, cfg in launched.items():
            variant = built[cfg.name(kind, dtype, last)]
            assert (variant.constants["ROWS"], variant.constants["COLS"]) == (cfg.rows, cfg.wide)
            assert variant.num_warps == cfg.num_warps
            assert kind == "whole" or cfg.chunk % 16 == 0  # as the variant promises


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_operator_is_what_torch_expects(layout: str) -> None:
    args = (*inputs((2, 12, 5, 7), LAYOUTS[layout], "fp32"), 3, 1e-5)
    torch.library.opcheck(torch.ops.latentrt.group_norm.default, args, {"silu": True})
    result = torch.ops.latentrt.group_norm(*args, silu=True)
    assert result.stride() == args[0].stride()
    torch.testing.assert_close(result, framework(*args, silu=True), rtol=1e-5, atol=1e-5)


def test_export_sees_one_node() -> None:
    _, weight, bias = inputs((2, 12, 5, 7), False, "fp32")

    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.latentrt.group_norm(x * 2, weight, bias, 3, 1e-5, True) + x

    program = torch.export.export(Block(), (random(2, 12, 5, 7),), dynamic_shapes=({2: torch.export.Dim.DYNAMIC},))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls.count("latentrt.group_norm.default") == 1
    assert not [call for call in calls if "var" in call or "sigmoid" in call]
    image = random(2, 12, 9, 7)
    expected = framework(image * 2, weight, bias, 3, 1e-5, True) + image
    torch.testing.assert_close(program.module()(image), expected, rtol=1e-5, atol=1e-5)
