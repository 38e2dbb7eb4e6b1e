"""accumulate: the kernel, its reference and its numpy twin against each other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from kernels.host import ops
from kernels.triton import accumulate as op
from tests.cases.triton import DEVICE, random


@pytest.mark.parametrize("numbers", [1, op.BLOCK, 2 * op.BLOCK + 7])
@pytest.mark.parametrize("keep", [0, 1])
def test_kernel_reference_and_numpy_give_the_same(numbers: int, keep: int) -> None:
    """What is not kept may be NaN."""
    x, flag = random(numbers), torch.tensor([keep], dtype=torch.int32, device=DEVICE)
    before = random(numbers) if keep else torch.full((numbers,), torch.nan, device=DEVICE)
    guarded = [torch.cat([before, torch.full((9,), 7.0, device=DEVICE)]) for _ in range(3)]
    op.reference(x, flag, guarded[0][:numbers])
    op.launch(x, flag, guarded[1][:numbers])
    out = guarded[2].cpu().numpy()
    ops.accumulate(x.cpu().numpy(), flag.cpu().numpy(), out[:numbers])
    expected = torch.cat([before + x if keep else x, torch.full((9,), 7.0, device=DEVICE)]).cpu().numpy()
    for got in (guarded[0].cpu().numpy(), guarded[1].cpu().numpy(), out):
        np.testing.assert_array_equal(got, expected)


def test_operator() -> None:
    x, out, keep = torch.randn(40), torch.randn(40), torch.ones(1, dtype=torch.int32)
    expected = x + out
    torch.ops.latentrt.accumulate(x, keep, out)
    assert torch.equal(out, expected)
    torch.library.opcheck(torch.ops.latentrt.accumulate.default, (x, keep, out))


@pytest.mark.parametrize("change, error, message", [
    (lambda a: a | {"x": a["x"].half()}, TypeError, "x: got torch.float16"),
    (lambda a: a | {"keep": a["keep"].float()}, TypeError, "keep: got torch.float32"),
    (lambda a: a | {"out": a["out"][:3]}, ValueError, "out: got shape"),
    (lambda a: a | {"x": a["x"].reshape(2, 4)}, ValueError, r"expected \[numbers\]"),
    (lambda a: a | {"x": a["x"].repeat(2)[::2]}, ValueError, "x: got"),
])
def test_wrong_arguments(change: Callable[..., dict[str, torch.Tensor]], error: type[Exception], message: str) -> None:
    arguments = change({"x": torch.zeros(8, device=DEVICE), "out": torch.zeros(8, device=DEVICE),
                        "keep": torch.zeros(1, dtype=torch.int32, device=DEVICE)})
    for run in (op.launch, torch.ops.latentrt.accumulate):
        with pytest.raises(error, match=message):
            run(**arguments)
