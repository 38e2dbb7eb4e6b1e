"""Input assembly: what the denoiser reads of every image of a static batch, at the row that its own counter points to.

For image b at row i of its table, into both of its rows of the denoiser's batch:

    sample = input_scale[i] · x
    time_k = times[b, i], columns of input k            for every input that depends on the timestep alone

Bytes moved for an image of n: n of state, 2n of sample, and every time value once in and twice out; 0.2 MB in fp32 at
n = 4·64·64. One launch does all inputs, since each costs less than a launch. It begins every step, so that an image
that enters a slot, and a change of engine, need nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from kernels.aot.variant import Variant
from kernels.host import step_table
from kernels.triton.checks import (
    DTYPES,
    archs_of,
    check_contiguous,
    check_device,
    check_dtype,
    check_shape,
    check_tensors,
)

OP = "step_input"
BLOCK = 1024
"""Numbers of one program, on every GPU and in every dtype."""

INPUT_SCALE = tl.constexpr(step_table.INPUT_SCALE)


def reference(state: torch.Tensor, table: torch.Tensor, progress: torch.Tensor, times: torch.Tensor,
              columns: torch.Tensor, sample: torch.Tensor, arena: torch.Tensor) -> None:
    """Compute `step_input` in plain torch."""
    images = len(state)
    first = len(sample) - images
    for b in range(images):
        i, rows, _ = progress[b].tolist()
        if i >= rows:
            continue
        sample[b] = sample[first + b] = state[b, 0] * table[b, i, step_table.INPUT_SCALE]
        for start, offset, width in columns.tolist():
            for row in (b, first + b):
                arena[offset + row * width:offset + (row + 1) * width] = times[b, i, start:start + width]


@triton.jit
def _step_input(
    state_ptr: tl.tensor, table_ptr: tl.tensor, progress_ptr: tl.tensor, times_ptr: tl.tensor, columns_ptr: tl.tensor,
    sample_ptr: tl.tensor, arena_ptr: tl.tensor, n: tl.tensor, states: tl.tensor, first: tl.tensor, rows: tl.tensor,
    width: tl.tensor, total: tl.tensor, BLOCK: tl.constexpr,
) -> None:
    """Do one block of one input of one image; the grid is (blocks, images, 1 + inputs), the sample first.

    rows, width: of a device table; total: numbers in one row of `times`.
    """
    image = tl.program_id(1).to(tl.int64)
    row = tl.load(progress_ptr + image * 3)
    if row >= tl.load(progress_ptr + image * 3 + 1):
        return
    here = image * rows + row
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(2)
    if part == 0:
        mask = offsets < n
        x = tl.load(state_ptr + image * states * n + offsets, mask=mask, other=0.0)
        scaled = (x * tl.load(table_ptr + here * width + INPUT_SCALE)).to(sample_ptr.dtype.element_ty)
        tl.store(sample_ptr + image * n + offsets, scaled, mask=mask)
        tl.store(sample_ptr + (first + image) * n + offsets, scaled, mask=mask)
    else:
        columns_ptr += (part - 1) * 3
        numbers = tl.load(columns_ptr + 2)
        mask = offsets < numbers
        values = tl.load(times_ptr + here * total + tl.load(columns_ptr) + offsets, mask=mask, other=0.0)
        out_ptr = arena_ptr + tl.load(columns_ptr + 1)
        tl.store(out_ptr + image * numbers + offsets, values, mask=mask)
        tl.store(out_ptr + (first + image) * numbers + offsets, values, mask=mask)


def launch(state: torch.Tensor, table: torch.Tensor, progress: torch.Tensor, times: torch.Tensor,
           columns: torch.Tensor, sample: torch.Tensor, arena: torch.Tensor) -> None:
    """Run `step_input` as one Triton kernel. Raises TypeError and ValueError as `check` does."""
    check(state, table, progress, times, columns, sample, arena)
    check_tensors(OP, _step_input, state=state)
    images, states = state.shape[:2]
    n, total = state[0, 0].numel(), times.shape[2]
    _step_input[(triton.cdiv(max(n, total), BLOCK), images, 1 + len(columns))](
        state, table, progress, times, columns, sample, arena, n, states, len(sample) - images, table.shape[1],
        table.shape[2], total, BLOCK=BLOCK, num_warps=4)


def check(state: torch.Tensor, table: torch.Tensor, progress: torch.Tensor, times: torch.Tensor,
          columns: torch.Tensor, sample: torch.Tensor, arena: torch.Tensor) -> None:
    """Raise TypeError for a wrong dtype, ValueError for a wrong shape, device or layout."""
    if state.ndim != 5 or 0 in state.shape:
        raise ValueError(f"{OP}: state: got shape {tuple(state.shape)}, expected [images, 1 + memory, C, h, w]")
    images, latent = len(state), state.shape[2:]
    if sample.shape not in ((images, *latent), (2 * images, *latent)):
        raise ValueError(f"{OP}: sample: got shape {tuple(sample.shape)}, expected {(2 * images, *latent)}, "
                         f"negative prompts first, or {(images, *latent)} without guidance")
    if table.ndim != 3 or len(table) != images or table.shape[2] <= step_table.INPUT_SCALE:
        raise ValueError(f"{OP}: table: got shape {tuple(table.shape)}, expected [{images}, rows, width]; make its "
                         "rows with kernels.host.step_table.pack")
    if times.ndim != 3 or times.shape[:2] != table.shape[:2]:
        raise ValueError(f"{OP}: times: got shape {tuple(times.shape)}, expected {tuple(table.shape[:2])} and the "
                         "numbers of a row; make them with kernels.host.step_table.pack_times")
    if arena.ndim != 1 or columns.ndim != 2:
        raise ValueError(f"{OP}: got arena {tuple(arena.shape)} and columns {tuple(columns.shape)}, expected "
                         "[numbers] and [inputs, 3]; make the columns with kernels.host.step_table.time_columns")
    check_shape(OP, (len(columns), 3), columns=columns)
    check_shape(OP, (images, 3), progress=progress)
    floats = {"state": state, "table": table, "times": times, "arena": arena}
    check_dtype(OP, torch.float32, **floats)
    check_dtype(OP, torch.int32, progress=progress, columns=columns)
    check_contiguous(OP, sample=sample, progress=progress, columns=columns, **floats)
    if sample.dtype not in DTYPES:
        raise TypeError(f"{OP}: sample: got {sample.dtype}, expected one of {', '.join(map(str, DTYPES))}; "
                        "convert it with .to(torch.float32)")
    check_device(OP, "state", state.device, sample=sample, progress=progress, columns=columns, **floats)


@torch.library.custom_op("latentrt::step_input", mutates_args=("sample", "arena"), device_types="cpu")
def step_input(state: torch.Tensor, table: torch.Tensor, progress: torch.Tensor, times: torch.Tensor,
               columns: torch.Tensor, sample: torch.Tensor, arena: torch.Tensor) -> None:
    """Write the denoiser's next input of every image, in place; nothing for an image that has no row left.

    state: fp32 [images, 1 + memory, C, h, w]. table: fp32 [images, rows, width], its rows made by
    `kernels.host.step_table.pack`. progress: int32 [images, 3], the next row, rows in all, and 0. times: fp32 [images,
    rows, numbers], made by `kernels.host.step_table.pack_times`. columns: int32 [inputs, 3], where an input begins in a
    row of `times`, where in `arena`, and how many numbers a row of it has.

    Updated: sample, fp16, bf16 or fp32 [2 · images, C, h, w], negative prompts first, or [images, C, h, w] without
    guidance. arena: fp32 [numbers], memory that the inputs lie in, each as [len(sample), numbers].

    Everything is contiguous and on one device. Raises TypeError and ValueError saying what was expected.
    """
    check(state, table, progress, times, columns, sample, arena)
    reference(state, table, progress, times, columns, sample, arena)


step_input.register_kernel("cuda")(launch)


@step_input.register_fake
def _(state: torch.Tensor, table: torch.Tensor, progress: torch.Tensor, times: torch.Tensor, columns: torch.Tensor,
      sample: torch.Tensor, arena: torch.Tensor) -> None:
    check(state, table, progress, times, columns, sample, arena)


def variants() -> Iterator[Variant]:
    """Yield every dtype of the denoiser; latents of any size, any inputs."""
    pointers = ("state_ptr", "table_ptr", "progress_ptr", "times_ptr", "columns_ptr", "sample_ptr", "arena_ptr")
    for dtype in DTYPES.values():
        types = dict.fromkeys(pointers, "*fp32") | dict.fromkeys(("progress_ptr", "columns_ptr"), "*i32")
        yield Variant(OP, f"step_input_{dtype}", _step_input,
                      signature=types | {"sample_ptr": f"*{dtype}"} | dict.fromkeys(
                          ("n", "states", "first", "rows", "width", "total"), "i32"),
                      constants={"BLOCK": BLOCK}, divisible=pointers, num_warps=4, archs=archs_of(dtype))
