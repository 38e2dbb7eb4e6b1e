"""step_input: the kernel, its reference and its numpy twin against each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.host import ops
from kernels.host.step_table import INPUT_SCALE
from kernels.triton import step_input as op
from tests.cases.step import SPACE, copied, input_arguments
from tests.cases.triton import DTYPES


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("latent", [(1, 1, 2), (4, 16, 20)], ids=["2", "1280"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_writes_what_the_reference_writes(dtype: str, latent: tuple[int, ...], guided: bool) -> None:
    """From less than one block to more than one; time inputs wider than the latents and narrower."""
    arguments = input_arguments(latent, dtype, guided, widths=(1, 1500 if latent[0] == 1 else 70, 3))
    truth, run = copied(arguments), copied(arguments)
    op.reference(**truth)
    op.launch(**run)
    for name in ("sample", "arena"):
        torch.testing.assert_close(run[name], truth[name], rtol=0, atol=0, equal_nan=True)
    assert run["sample"].isfinite().any()


def test_numpy_writes_what_the_reference_writes() -> None:
    arguments = input_arguments()
    truth, run = copied(arguments), {name: t.cpu().numpy().copy() for name, t in arguments.items()}
    op.reference(**truth)
    ops.step_input(**run)
    for name in ("sample", "arena"):
        np.testing.assert_array_equal(run[name], truth[name].cpu().numpy())


def test_every_image_is_at_its_own_row_and_one_that_is_done_stays() -> None:
    """The values themselves, from the definition: neither kernel nor reference is asked."""
    run = input_arguments()
    op.launch(**run)
    state, table, times = (run[name].cpu() for name in ("state", "table", "times"))
    second = run["arena"][16 + SPACE:][:6 * 70].reshape(6, 70).cpu()
    for image, row in ((0, 0), (1, 2)):
        for place in (image, 3 + image):
            torch.testing.assert_close(run["sample"][place].cpu(), state[image, 0] * table[image, row, INPUT_SCALE])
            torch.testing.assert_close(second[place], times[image, row, 1:71], rtol=0, atol=0)
    assert run["sample"][[2, 5]].isnan().all() and second[[2, 5]].isnan().all()
    assert run["arena"][:16].isnan().all() and run["arena"][16 + 6:16 + SPACE].isnan().all(), "written beside inputs"


@pytest.mark.parametrize(("name", "change", "error", "message"), [
    ("state", lambda t: t.half(), TypeError, "state: got torch.float16"),
    ("sample", lambda t: t[:5], ValueError, "sample: got shape .* negative prompts first"),
    ("times", lambda t: t[:, :2], ValueError, "times: got shape .*pack_times"),
    ("columns", lambda t: t[:, :2], ValueError, "columns: got shape"),
    ("progress", lambda t: t.long(), TypeError, "progress: got torch.int64"),
    ("arena", lambda t: t[None], ValueError, "arena .*time_columns"),
    ("table", lambda t: t.mT.contiguous().mT, ValueError, "contiguous")])
def test_wrong_arguments_are_refused(name: str, change, error: type[Exception], message: str) -> None:
    arguments = input_arguments()
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=message):
        torch.ops.latentrt.step_input(**arguments)
