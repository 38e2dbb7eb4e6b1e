"""guidance_step over whole runs: against the numpy step for every sampler, blended, and from a captured graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.host.step import advance, guide, initial_state
from kernels.host.step_table import fitting_memory, pack
from kernels.triton import guidance_step as op
from runtime.schedulers import Table, make_table, names
from tests.cases.step import Arguments, copied
from tests.cases.triton import DEVICE
from tests.runtime.schedulers.test_schedulers import STABLE
from tests.tolerances import SCHEDULER_REL


def model(sample: np.ndarray, timestep: float) -> np.ndarray:
    """Stands for a UNet without and with its prompt: [C, h, w] to [2, C, h, w]."""
    wave = np.sin(np.float32(timestep / 300) + sample)
    return np.stack([0.5 * wave + 0.1 * sample, wave * 0.8 - 0.2 * sample[::-1]]).astype(np.float32)


def run_numpy(table: Table, start: np.ndarray, noise: np.ndarray, guidance: float, rescale: float) -> np.ndarray:
    """The latents that the runtime's own loop on a CPU ends with; the row i draws noise[i]."""
    state = initial_state(table, start)
    for i in range(table.rows):
        pair = model(state[0] * np.float32(table.input_scale[i]), float(np.float32(table.timesteps[i])))
        m = guide(pair[0], pair[1], guidance, rescale) if guidance > 1 else pair[1]
        advance(state, m, noise[i] if table.draws[i] else None, table, i)
    return state[0]


def batch_of(tables: list[Table], start: np.ndarray, noise: np.ndarray, controls: np.ndarray) -> Arguments:
    """Buffers of a batch whose images have `tables`, with the input of every first row in place."""
    images, latent = len(tables), start.shape[1:]
    memory, rows = fitting_memory(max(t.slots for t in tables)), max(t.rows for t in tables)
    state = np.full((images, 1 + memory, *latent), 0, np.float32)
    state[:, 0] = [initial_state(t, s)[0] for t, s in zip(tables, start, strict=True)]
    packed = np.stack([pack(t, memory, rows) for t in tables])
    scale = np.array([t.input_scale[0] for t in tables], np.float32)[:, None, None, None]
    timestep = np.array([t.timesteps[0] for t in tables], np.float32)
    arrays = {"noise_pred": np.full((2 * images, *latent), np.nan, np.float32), "noise": noise, "table": packed,
              "controls": controls.astype(np.float32), "known": np.full((images, 3, *latent), np.nan, np.float32),
              "state": state, "sample": np.concatenate([state[:, 0] * scale] * 2),
              "timestep": np.concatenate([timestep] * 2),
              "progress": np.array([[0, t.rows, 0] for t in tables], np.int32)}
    return {name: torch.from_numpy(np.ascontiguousarray(a)).to(DEVICE) for name, a in arrays.items()}


def predict(batch: Arguments) -> None:
    """Write the model's output for the batch's current input."""
    images = len(batch["state"])
    pairs = [model(s, t) for s, t in zip(batch["sample"][images:].cpu().numpy(), batch["timestep"][images:].tolist(),
                                         strict=True)]
    batch["noise_pred"].copy_(torch.from_numpy(np.concatenate(np.stack(pairs, 1))))


def test_every_sampler_ends_where_the_numpy_loop_ends() -> None:
    """One batch of all of them: their own lengths, guidance and noise; the kernel alone writes the model's inputs."""
    samplers = names()
    tables = [make_table(STABLE, 5, scheduler=name) for name in samplers]
    tables += [make_table(STABLE | {"_class_name": "DDIMScheduler", "clip_sample": True}, 5, eta=0.5)]
    samplers = [*samplers, "ddim, clamped, eta 0.5"]
    assert {t.slots for t in tables} == {0, 1, 3}
    assert len({t.rows for t in tables}) > 1
    rng = np.random.default_rng(5)
    images, rows = len(tables), max(t.rows for t in tables)
    start = rng.standard_normal((images, 4, 3, 4)).astype(np.float32)
    noise = rng.standard_normal((images, rows, 4, 3, 4)).astype(np.float32)
    controls = np.array([[(7.5, 0.0, 0), (1.0, 0.0, 0), (4.0, 0.7, 0)][b % 3] for b in range(images)])
    batch = batch_of(tables, start, noise, controls)
    for _ in range(rows):
        predict(batch)
        op.launch(**batch)
    assert batch["progress"].tolist() == [[t.rows, t.rows, 0] for t in tables]
    for b, (name, table) in enumerate(zip(samplers, tables, strict=True)):
        drawn = noise[b, np.maximum(np.cumsum(table.draws) - 1, 0)]
        expected = run_numpy(table, start[b], drawn, controls[b, 0], controls[b, 1])
        error = np.abs(batch["state"][b, 0].cpu().numpy() - expected).max() / np.abs(expected).max()
        assert error < SCHEDULER_REL, f"{name}: {error:.1e} from the numpy loop, expected less than {SCHEDULER_REL}"


def test_seven_arrays_of_memory_do_what_three_do() -> None:
    """LMS in a batch with room for more memory than it has, and PNDM with all its five arrays."""
    start = np.random.default_rng(1).standard_normal((2, 4, 3, 4)).astype(np.float32)
    tables = [make_table(STABLE, 6, scheduler="lms"), make_table(STABLE | {"skip_prk_steps": False}, 6)]
    assert [t.slots for t in tables] == [3, 5]
    batch = batch_of(tables, start, np.full((2, 1, 4, 3, 4), np.nan, np.float32), np.array([[2.0, 0, 0], [2.0, 0, 0]]))
    assert batch["state"].shape[1] == 8
    for _ in range(max(t.rows for t in tables)):
        predict(batch)
        op.launch(**batch)
    for b, table in enumerate(tables):
        expected = run_numpy(table, start[b], np.empty((table.rows, 0)), 2.0, 0.0)
        np.testing.assert_allclose(batch["state"][b, 0].cpu().numpy(), expected, rtol=0,
                                   atol=SCHEDULER_REL * np.abs(expected).max())


def test_blending_keeps_what_is_known_at_the_level_of_the_row() -> None:
    """Legacy inpainting: keep · (signal · x0 + sigma · noise) + (1 − keep) · x after the step, memory untouched."""
    table = make_table(STABLE, 4, scheduler="ddim")
    rng = np.random.default_rng(2)
    start, x0, fixed = rng.standard_normal((3, 1, 4, 3, 4)).astype(np.float32)
    batch = batch_of([table], start, fixed[:, None], np.array([[3.0, 0.0, 1.0]]))
    keep = np.broadcast_to(np.array([0.0, 0.25, 1.0, 1.0], np.float32), x0[0].shape)
    batch["known"].copy_(torch.from_numpy(np.stack([x0[0], fixed[0], keep])[None]))
    state = initial_state(table, start[0])
    for i in range(table.rows):
        predict(batch)
        pair = batch["noise_pred"].cpu().numpy()
        op.launch(**batch)
        advance(state, guide(pair[0], pair[1], 3.0), None, table, i)
        known = table.signal[i] * x0[0] + table.sigma[i] * fixed[0]
        state[0] = keep * known + (1 - keep) * state[0]
        np.testing.assert_allclose(batch["state"][0, 0].cpu().numpy(), state[0], rtol=0, atol=2e-5)


@pytest.mark.gpu
def test_a_captured_graph_runs_the_whole_schedule() -> None:
    """The graph holds one step with a constant model output; replays advance each image until it is done."""
    tables = [make_table(STABLE, 7, scheduler=name) for name in ("euler", "dpm++_2m", "heun")]
    rng = np.random.default_rng(4)
    start = rng.standard_normal((3, 4, 64, 64)).astype(np.float32)
    rows = max(t.rows for t in tables)
    batch = batch_of(tables, start, rng.standard_normal((3, rows, 4, 64, 64)).astype(np.float32),
                     np.array([[7.5, 0.7, 0.0]] * 3))
    batch["noise_pred"].copy_(torch.from_numpy(rng.standard_normal((6, 4, 64, 64)).astype(np.float32)))
    expected = copied(batch)
    for _ in range(rows):
        op.reference(**expected)
    warm = copied(batch)
    op.launch(**warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        op.launch(**batch)
    for _ in range(rows + 3):
        graph.replay()
    assert batch["progress"].tolist() == expected["progress"].tolist()
    largest = expected["state"].abs().max().item()
    torch.testing.assert_close(batch["state"], expected["state"], rtol=0, atol=SCHEDULER_REL * largest)
