"""Guidance and one row of a sampler table for every image of a static batch, in one launch and in place.

For image b with guidance g, rescale r (arXiv 2305.08891 §3.4) and the row i that its own counter points to:

    m     = u + g · (c − u), times r · std(c) / std(m) + 1 − r     (c where g = 1)
    p     = predict[i, 0] · x + predict[i, 1] · m, clamped to ±clip[i] where clip[i] > 0
    state = mix[i] @ [x, p, s1 … sS, noise, m]
    x     = keep · (signal[i] · x0 + sigma[i] · known noise) + (1 − keep) · x     (inpainting by blending)
    next  = input_scale[i + 1] · x into both rows of `sample`, timesteps[i + 1] into both rows of `timestep`; i += 1

Values moved for an image of n: 2n of noise_pred, (1 + S) · n of state read and written, 2n of sample, and where wanted
n of noise and 3n of what is known; in fp32 0.8 to 1 MB at S = 3, n = 4·64·64. So little that launches and waiting are
what counts: one launch does it all, each image cut into blocks with a program each. Deviations are of the whole image,
and each program takes them for itself rather than wait for the others. The last program of an image to finish moves
its counter on, so that a captured graph can be replayed for every step.
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

OP = "guidance_step"
CHUNK, NUM_WARPS = 4096, 4
"""Values that are read at once for deviations, and warps of a program: on every GPU and in every dtype."""

TIMESTEP = tl.constexpr(step_table.TIMESTEP)
INPUT_SCALE = tl.constexpr(step_table.INPUT_SCALE)
PREDICT_X = tl.constexpr(step_table.PREDICT_X)
PREDICT_M = tl.constexpr(step_table.PREDICT_M)
CLIP = tl.constexpr(step_table.CLIP)
DRAW = tl.constexpr(step_table.DRAW)
SIGNAL = tl.constexpr(step_table.SIGNAL)
SIGMA = tl.constexpr(step_table.SIGMA)
MIX = tl.constexpr(step_table.MIX)


def reference(noise_pred: torch.Tensor, noise: torch.Tensor, table: torch.Tensor, controls: torch.Tensor,
              known: torch.Tensor, state: torch.Tensor, sample: torch.Tensor, timestep: torch.Tensor,
              progress: torch.Tensor) -> None:
    """Compute `guidance_step` in plain torch, in the dtype of `state`: float64 tensors give the float64 result."""
    images, states = state.shape[:2]
    first = len(noise_pred) - images
    for b in range(images):
        i, rows, _ = progress[b].tolist()
        if i >= rows:
            continue
        row = table[b, i].tolist()
        mix = table[b, i, step_table.MIX:].reshape(states, states + 3)
        guidance, rescale, blend = controls[b].tolist()
        m = cond = noise_pred[first + b].to(state.dtype)
        if guidance != 1:
            uncond = noise_pred[b].to(state.dtype)
            m = uncond + guidance * (cond - uncond)
            if rescale:
                m = m * (rescale * (cond.std() / m.std()) + 1 - rescale)
        x = state[b, 0]
        p = row[step_table.PREDICT_X] * x + row[step_table.PREDICT_M] * m
        if (clip := row[step_table.CLIP]) > 0:
            p = p.clamp(-clip, clip)
        draw = int(row[step_table.DRAW])
        fresh = torch.zeros_like(x) if draw < 0 else noise[b, draw % noise.shape[1]]
        new = torch.tensordot(mix, torch.stack([x, p, *state[b, 1:], fresh, m]), 1)
        if blend:
            x0, known_noise, keep = known[b]
            new[0] = keep * (row[step_table.SIGNAL] * x0 + row[step_table.SIGMA] * known_noise) + (1 - keep) * new[0]
        state[b] = new
        progress[b, 0] += 1
        if i + 1 < rows:
            following = table[b, i + 1].tolist()
            sample[b] = sample[first + b] = new[0] * following[step_table.INPUT_SCALE]
            timestep[b] = timestep[first + b] = following[step_table.TIMESTEP]


@triton.jit
def _include(count: tl.tensor, mean: tl.tensor, squares: tl.tensor, values: tl.tensor, size: tl.tensor,
             mask: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Return mean and sum of squared deviations after `size` more values (Chan, Golub and LeVeque, 1983)."""
    mean_here = tl.sum(tl.where(mask, values, 0.0)) / size
    deviation = tl.where(mask, values - mean_here, 0.0)
    delta = mean_here - mean
    share = size / (count + size)
    return mean + delta * share, squares + tl.sum(deviation * deviation) + delta * delta * count * share


@triton.jit
def _ratio_of_deviations(uncond_ptr: tl.tensor, cond_ptr: tl.tensor, n: tl.tensor, guidance: tl.tensor,
                         CHUNK: tl.constexpr) -> tl.tensor:
    """Return the standard deviation of the whole conditional prediction over that of the guided one."""
    count = 0.0
    mean_cond, squares_cond = 0.0, 0.0
    mean_guided, squares_guided = 0.0, 0.0
    start = 0
    while start < n:
        offsets = start + tl.arange(0, CHUNK)
        mask = offsets < n
        cond = tl.load(cond_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        uncond = tl.load(uncond_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        size = tl.minimum(n - start, CHUNK).to(tl.float32)
        mean_cond, squares_cond = _include(count, mean_cond, squares_cond, cond, size, mask)
        guided = uncond + guidance * (cond - uncond)
        mean_guided, squares_guided = _include(count, mean_guided, squares_guided, guided, size, mask)
        count += size
        start += CHUNK
    return tl.sqrt_rn(squares_cond / squares_guided)


@triton.jit
def _guidance_step(
    noise_pred_ptr: tl.tensor, noise_ptr: tl.tensor, table_ptr: tl.tensor, controls_ptr: tl.tensor,
    known_ptr: tl.tensor, state_ptr: tl.tensor, sample_ptr: tl.tensor, timestep_ptr: tl.tensor, progress_ptr: tl.tensor,
    n: tl.tensor, first: tl.tensor, rows: tl.tensor, draws: tl.tensor,
    MEMORY: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
) -> None:
    """Do one block of one image; the grid is (blocks, images). rows: of a device table; draws: kept in `noise`."""
    image = tl.program_id(1).to(tl.int64)
    progress_ptr += image * 3
    row = tl.load(progress_ptr)
    last = tl.load(progress_ptr + 1) - 1
    if row > last:
        return
    WIDTH: tl.constexpr = MIX + (1 + MEMORY) * (MEMORY + 4)
    row_ptr = table_ptr + (image * rows + row) * WIDTH
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    state_ptr += image * (1 + MEMORY) * n
    uncond_row = image
    cond_row = first + image

    guidance = tl.load(controls_ptr + image * 3)
    rescale = tl.load(controls_ptr + image * 3 + 1)
    blend = tl.load(controls_ptr + image * 3 + 2)
    cond = tl.load(noise_pred_ptr + cond_row * n + offsets, mask=mask, other=0.0).to(tl.float32)
    uncond = tl.load(noise_pred_ptr + uncond_row * n + offsets, mask=mask, other=0.0).to(tl.float32)
    m = tl.where(guidance == 1.0, cond, uncond + guidance * (cond - uncond))
    if (rescale > 0.0) & (guidance != 1.0):
        ratio = _ratio_of_deviations(noise_pred_ptr + uncond_row * n, noise_pred_ptr + cond_row * n, n, guidance, CHUNK)
        m *= rescale * ratio + (1.0 - rescale)

    x = tl.load(state_ptr + offsets, mask=mask, other=0.0)
    p = tl.load(row_ptr + PREDICT_X) * x + tl.load(row_ptr + PREDICT_M) * m
    clip = tl.load(row_ptr + CLIP)
    clip = tl.where(clip > 0.0, clip, float("inf"))
    p = tl.where(p > clip, clip, tl.where(p < -clip, -clip, p))  # what is not a number stays so, as in numpy
    draw = tl.load(row_ptr + DRAW).to(tl.int32)
    noise_ptr += (image * draws + tl.maximum(draw, 0) % draws) * n
    noise = tl.load(noise_ptr + offsets, mask=mask & (draw >= 0), other=0.0)

    states = tl.arange(0, 1 + MEMORY)[:, None]
    mix_ptr = row_ptr + MIX + states * (MEMORY + 4)
    new = tl.load(mix_ptr) * x[None, :] + tl.load(mix_ptr + 1) * p[None, :]
    for slot in tl.static_range(MEMORY):
        memory = tl.load(state_ptr + (1 + slot) * n + offsets, mask=mask, other=0.0)
        new += tl.load(mix_ptr + 2 + slot) * memory[None, :]
    new += tl.load(mix_ptr + 2 + MEMORY) * noise[None, :] + tl.load(mix_ptr + 3 + MEMORY) * m[None, :]
    if blend > 0.0:
        known_ptr += image * 3 * n
        x0 = tl.load(known_ptr + offsets, mask=mask, other=0.0)
        known_noise = tl.load(known_ptr + n + offsets, mask=mask, other=0.0)
        keep = tl.load(known_ptr + 2 * n + offsets, mask=mask, other=0.0)
        known = tl.load(row_ptr + SIGNAL) * x0 + tl.load(row_ptr + SIGMA) * known_noise
        new = tl.where(states == 0, (keep * known)[None, :] + (1.0 - keep)[None, :] * new, new)

    # Warps may load what other warps of this program overwrite below, and the counter may move as soon as this program
    # has said that it is done: every load of anything that changes ends here, in every warp.
    tl.debug_barrier()
    tl.store(state_ptr + states * n + offsets[None, :], new, mask=mask[None, :])
    if row < last:
        following_ptr = row_ptr + WIDTH
        new_x = tl.sum(tl.where(states == 0, new, 0.0), 0)
        scaled = (new_x * tl.load(following_ptr + INPUT_SCALE)).to(sample_ptr.dtype.element_ty)
        tl.store(sample_ptr + uncond_row * n + offsets, scaled, mask=mask)
        tl.store(sample_ptr + cond_row * n + offsets, scaled, mask=mask)
        if tl.program_id(0) == 0:
            following = tl.load(following_ptr + TIMESTEP)
            tl.store(timestep_ptr + uncond_row, following)
            tl.store(timestep_ptr + cond_row, following)
    if tl.atomic_add(progress_ptr + 2, 1) == tl.num_programs(0) - 1:
        tl.store(progress_ptr + 2, 0)
        tl.store(progress_ptr, row + 1)


def block(memory: int) -> int:
    """Return how many values of an image one program does, for `memory` arrays of memory: 2048 floats of new state."""
    return 2048 // (1 + memory)


def launch(noise_pred: torch.Tensor, noise: torch.Tensor, table: torch.Tensor, controls: torch.Tensor,
           known: torch.Tensor, state: torch.Tensor, sample: torch.Tensor, timestep: torch.Tensor,
           progress: torch.Tensor) -> None:
    """Run `guidance_step` as one Triton kernel. Raises TypeError and ValueError as `check` does."""
    check(noise_pred, noise, table, controls, known, state, sample, timestep, progress)
    check_tensors(OP, _guidance_step, state=state)
    images, states = state.shape[:2]
    n = state[0, 0].numel()
    size = block(states - 1)
    _guidance_step[(triton.cdiv(n, size), images)](
        noise_pred, noise, table, controls, known, state, sample, timestep, progress, n, len(noise_pred) - images,
        table.shape[1], noise.shape[1], MEMORY=states - 1, BLOCK=size, CHUNK=CHUNK, num_warps=NUM_WARPS)


def check(noise_pred: torch.Tensor, noise: torch.Tensor, table: torch.Tensor, controls: torch.Tensor,
          known: torch.Tensor, state: torch.Tensor, sample: torch.Tensor, timestep: torch.Tensor,
          progress: torch.Tensor) -> None:
    """Raise TypeError for a wrong dtype, ValueError for a wrong shape, device or layout."""
    if state.ndim != 5 or state.shape[1] - 1 not in step_table.MEMORIES or 0 in state.shape:
        raise ValueError(f"{OP}: state: got shape {tuple(state.shape)}, expected [images, 1 + memory, C, h, w] with a "
                         f"memory of {', '.join(map(str, step_table.MEMORIES))}; pad it "
                         "(kernels.host.step_table.fitting_memory)")
    images, states, *latent = state.shape
    if noise_pred.shape not in ((images, *latent), (2 * images, *latent)):
        raise ValueError(f"{OP}: noise_pred: got shape {tuple(noise_pred.shape)}, expected {(2 * images, *latent)}, "
                         f"negative prompts first, or {(images, *latent)} without guidance")
    if noise.shape[:1] + noise.shape[2:] != (images, *latent) or noise.shape[1] == 0:
        raise ValueError(f"{OP}: noise: got shape {tuple(noise.shape)}, expected [{images}, draws, "
                         f"{', '.join(map(str, latent))}] with at least one draw")
    if table.ndim != 3 or table.shape[::2] != (images, width := step_table.width(states - 1)):
        raise ValueError(f"{OP}: table: got shape {tuple(table.shape)}, expected [{images}, rows, {width}]; make its "
                         "rows with kernels.host.step_table.pack")
    floats = {"noise": noise, "table": table, "controls": controls, "known": known, "state": state,
              "timestep": timestep}
    check_dtype(OP, torch.float32, **floats)
    check_dtype(OP, torch.int32, progress=progress)
    check_dtype(OP, noise_pred.dtype, sample=sample)
    check_shape(OP, (images, 3), controls=controls, progress=progress)
    check_shape(OP, (images, 3, *latent), known=known)
    check_shape(OP, tuple(noise_pred.shape), sample=sample)
    check_shape(OP, (len(noise_pred),), timestep=timestep)
    check_contiguous(OP, noise_pred=noise_pred, sample=sample, progress=progress, **floats)
    if noise_pred.dtype not in DTYPES:
        raise TypeError(f"{OP}: noise_pred: got {noise_pred.dtype}, expected one of {', '.join(map(str, DTYPES))}; "
                        "convert it with .to(torch.float32)")
    check_device(OP, "state", state.device, noise_pred=noise_pred, sample=sample, progress=progress, **floats)


@torch.library.custom_op("latentrt::guidance_step", mutates_args=("state", "sample", "timestep", "progress"),
                         device_types="cpu")
def guidance_step(noise_pred: torch.Tensor, noise: torch.Tensor, table: torch.Tensor, controls: torch.Tensor,
                  known: torch.Tensor, state: torch.Tensor, sample: torch.Tensor, timestep: torch.Tensor,
                  progress: torch.Tensor) -> None:
    """Do guidance and the next solver row of every image, in place; nothing for an image that has no row left.

    noise_pred: the denoiser's output, fp16, bf16 or fp32 [2 · images, C, h, w], negative prompts first, or [images, C,
    h, w] without guidance. noise: fp32 [images, draws, C, h, w], unit variance; the k-th draw of an image reads
    noise[:, k % draws], so it holds either the next draw or all of them. table: fp32 [images, rows, width(memory)],
    its rows made by `kernels.host.step_table.pack`. controls: fp32 [images, 3], guidance (1: the prompt alone), share
    of rescaled guidance (0: none), and 1 to blend in what is known or 0. known: fp32 [images, 3, C, h, w], the clean
    latents, their noise, and the mask: 1 keeps them, 0 paints.

    Updated: state, fp32 [images, 1 + memory, C, h, w], the sample and the solver's memory (1, 3 or 7 arrays). sample,
    like noise_pred, and timestep, fp32 [rows of noise_pred]: the next input of the denoiser, unless there is none.
    progress: int32 [images, 3], the next row, rows in all, and 0 (used inside a launch).

    Everything is contiguous and on one device. Raises TypeError and ValueError saying what was expected.
    """
    check(noise_pred, noise, table, controls, known, state, sample, timestep, progress)
    reference(noise_pred, noise, table, controls, known, state, sample, timestep, progress)


guidance_step.register_kernel("cuda")(launch)


@guidance_step.register_fake
def _(noise_pred: torch.Tensor, noise: torch.Tensor, table: torch.Tensor, controls: torch.Tensor, known: torch.Tensor,
      state: torch.Tensor, sample: torch.Tensor, timestep: torch.Tensor, progress: torch.Tensor) -> None:
    check(noise_pred, noise, table, controls, known, state, sample, timestep, progress)


def variants() -> Iterator[Variant]:
    """Yield every dtype of the denoiser × every size of memory; latents of any size."""
    pointers = ("noise_pred_ptr", "noise_ptr", "table_ptr", "controls_ptr", "known_ptr", "state_ptr", "sample_ptr",
                "timestep_ptr", "progress_ptr")
    for dtype in DTYPES.values():
        for memory in step_table.MEMORIES:
            types = dict.fromkeys(pointers, "*fp32") | {"progress_ptr": "*i32"}
            types |= dict.fromkeys(("noise_pred_ptr", "sample_ptr"), f"*{dtype}")
            yield Variant(OP, f"guidance_step_{dtype}_memory{memory}", _guidance_step,
                          signature=types | dict.fromkeys(("n", "first", "rows", "draws"), "i32"),
                          constants={"MEMORY": memory, "BLOCK": block(memory), "CHUNK": CHUNK}, divisible=pointers,
                          num_warps=NUM_WARPS, archs=archs_of(dtype))
