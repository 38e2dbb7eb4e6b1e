"""step_input: the kernel, its reference and the runtime's numpy against each other; time inputs packed and unpacked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.host import ops
from kernels.host.step_table import INPUT_SCALE, pack_times, time_columns
from kernels.triton import step_input as op
from tests.tools.kernel_cases import DEVICE, DTYPES

Arguments = dict[str, torch.Tensor]
SPACE = 20_000
"""Numbers of the arena for each time input."""


def random_arguments(latent: tuple[int, ...] = (4, 6, 5), dtype: str = "fp32", guided: bool = True,
                     widths: tuple[int, ...] = (1, 70, 3)) -> Arguments:
    """Three images at rows 0 and 2 of 4 and at the end; the arena has gaps that nothing may write to."""
    generator = torch.Generator().manual_seed(4)
    images, batch, rows = 3, 3 * (1 + guided), 4
    names = [str(k) for k in range(len(widths))]
    offsets = {name: 16 + SPACE * k for k, name in enumerate(names)}
    return {
        "state": torch.randn(images, 4, *latent, generator=generator).to(DEVICE),
        "table": torch.randn(images, rows, 36, generator=generator).to(DEVICE),
        "progress": torch.tensor([[0, 4, 0], [2, 3, 0], [4, 4, 0]], dtype=torch.int32, device=DEVICE),
        "times": torch.randn(images, rows, sum(widths), generator=generator).to(DEVICE),
        "columns": torch.from_numpy(time_columns(dict(zip(names, widths, strict=True)), offsets)).to(DEVICE),
        "sample": torch.full((batch, *latent), torch.nan, dtype=DTYPES[dtype], device=DEVICE),
        "arena": torch.full((16 + SPACE * len(widths),), torch.nan, device=DEVICE)}


def copied(arguments: Arguments) -> Arguments:
    return {name: tensor.clone() for name, tensor in arguments.items()}


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("latent", [(1, 1, 2), (4, 16, 20)], ids=["2", "1280"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_writes_what_the_reference_writes(dtype: str, latent: tuple[int, ...], guided: bool) -> None:
    """From less than one block to more than one; time inputs wider than the latents and narrower."""
    arguments = random_arguments(latent, dtype, guided, widths=(1, 1500 if latent[0] == 1 else 70, 3))
    truth, run = copied(arguments), copied(arguments)
    op.reference(**truth)
    op.launch(**run)
    for name in ("sample", "arena"):
        torch.testing.assert_close(run[name], truth[name], rtol=0, atol=0, equal_nan=True)
    assert run["sample"].isfinite().any()


def test_numpy_writes_what_the_reference_writes() -> None:
    arguments = random_arguments()
    truth, run = copied(arguments), {name: t.cpu().numpy().copy() for name, t in arguments.items()}
    op.reference(**truth)
    ops.step_input(**run)
    for name in ("sample", "arena"):
        np.testing.assert_array_equal(run[name], truth[name].cpu().numpy())


def test_every_image_is_at_its_own_row_and_one_that_is_done_stays() -> None:
    """The values themselves, from the definition: neither kernel nor reference is asked."""
    run = random_arguments()
    op.launch(**run)
    state, table, times = (run[name].cpu() for name in ("state", "table", "times"))
    second = run["arena"][16 + SPACE:][:6 * 70].reshape(6, 70).cpu()
    for image, row in ((0, 0), (1, 2)):
        for place in (image, 3 + image):
            torch.testing.assert_close(run["sample"][place].cpu(), state[image, 0] * table[image, row, INPUT_SCALE])
            torch.testing.assert_close(second[place], times[image, row, 1:71], rtol=0, atol=0)
    assert run["sample"][[2, 5]].isnan().all() and second[[2, 5]].isnan().all()
    assert run["arena"][:16].isnan().all() and run["arena"][16 + 6:16 + SPACE].isnan().all(), "written beside inputs"


def test_time_inputs_come_back_as_they_were_packed() -> None:
    rng = np.random.default_rng(0)
    times = {"timestep": np.arange(3), "a": rng.standard_normal((3, 5, 2)), "b": rng.standard_normal((3, 4))}
    packed = pack_times(times)
    widths = {"timestep": 1, "a": 10, "b": 4}
    assert packed.shape == (3, 15) and packed.dtype == np.float32
    for name, (start, offset, width) in zip(times, time_columns(widths, dict.fromkeys(widths, 64)), strict=True):
        assert offset == 64
        np.testing.assert_array_equal(packed[:, start:start + width], times[name].reshape(3, -1).astype(np.float32))


@pytest.mark.parametrize(("name", "change", "error", "message"), [
    ("state", lambda t: t.half(), TypeError, "state: got torch.float16"),
    ("sample", lambda t: t[:5], ValueError, "sample: got shape .* negative prompts first"),
    ("times", lambda t: t[:, :2], ValueError, "times: got shape .*pack_times"),
    ("columns", lambda t: t[:, :2], ValueError, "columns: got shape"),
    ("progress", lambda t: t.long(), TypeError, "progress: got torch.int64"),
    ("arena", lambda t: t[None], ValueError, "arena .*time_columns"),
    ("table", lambda t: t.mT.contiguous().mT, ValueError, "contiguous")])
def test_wrong_arguments_are_refused(name: str, change, error: type[Exception], message: str) -> None:
    arguments = random_arguments()
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=message):
        torch.ops.latentrt.step_input(**arguments)
