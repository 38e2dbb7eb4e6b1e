"""guidance_step: against the numpy step of the runtime for every sampler, and against its reference in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.host.step import advance, guide, initial_state
from kernels.host.step_table import CLIP, DRAW, MEMORIES, MIX, fitting_memory, pack, width
from kernels.triton import guidance_step as op
from runtime.schedulers import Table, make_table, names
from tests.runtime.schedulers.test_schedulers import STABLE
from tests.tolerances import SCHEDULER_REL
from tests.tools.kernel_cases import DEVICE, DTYPES

UPDATED = ("state", "sample", "timestep")
FLOOR = 1e-6
"""What a kernel may differ from the float64 result beside twice the error of its reference, of the largest value."""

Arguments = dict[str, torch.Tensor]


def random_arguments(images: int = 2, memory: int = 3, latent: tuple[int, ...] = (4, 6, 5), dtype: str = "fp32",
                     guided: bool = True, rows: int = 3, draws: int = 2) -> Arguments:
    """Arguments on which every term counts: each image guided, rescaled and blended, with an arbitrary table."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    table = random(images, rows, width(memory))
    table[:, :, DRAW] = torch.arange(rows)
    controls = torch.tensor([[7.5, 0.7, 1.0], [0.5, 0.2, 1.0], [3.0, 0.0, 0.0]])[torch.arange(images) % 3]
    known = random(images, 3, *latent)
    known[:, 2] = torch.rand(images, *latent, generator=generator)
    batch = images * (1 + guided)
    return {
        "noise_pred": (random(batch, *latent) * 1.5 + 0.3).to(DTYPES[dtype]).to(DEVICE),
        "noise": random(images, draws, *latent).to(DEVICE), "table": table.to(DEVICE), "controls": controls.to(DEVICE),
        "known": known.to(DEVICE), "state": random(images, 1 + memory, *latent).to(DEVICE),
        "sample": torch.full((batch, *latent), torch.nan, dtype=DTYPES[dtype], device=DEVICE),
        "timestep": torch.full((batch,), torch.nan, device=DEVICE),
        "progress": torch.tensor([[b % (rows - 1), rows, 0] for b in range(images)], dtype=torch.int32, device=DEVICE)}


def copied(arguments: Arguments, dtype: torch.dtype | None = None) -> Arguments:
    return {name: t.to(dtype if t.is_floating_point() else None, copy=True) for name, t in arguments.items()}


def check_against_reference(arguments: Arguments, run: Arguments) -> None:
    """Compare `run`, on which the kernel has worked, with the reference on `arguments`."""
    truth, own = copied(arguments, torch.float64), copied(arguments)
    op.reference(**truth)
    op.reference(**own)
    assert run["progress"].tolist() == truth["progress"].tolist()
    for name in UPDATED:
        scale = truth[name].abs().max().item()
        error = (run[name].double() - truth[name]).abs().max().item()
        allowed = 2 * (own[name].double() - truth[name]).abs().max().item() + FLOOR * scale
        assert error <= allowed, f"{name}: {error:.2e} from the float64 result, expected at most {allowed:.2e}"


@pytest.mark.parametrize("latent", [(1, 1, 2), (3, 5, 7), (4, 16, 16), (4, 36, 32)],
                         ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_step_matches_the_reference(dtype: str, memory: int, latent: tuple[int, ...]) -> None:
    """From less than one block to several, the last of them partly filled; 4·36·32 takes two chunks to rescale."""
    arguments = random_arguments(memory=memory, latent=latent, dtype=dtype)
    run = copied(arguments)
    op.launch(**run)
    check_against_reference(arguments, run)


@pytest.mark.parametrize("latent", [(4, 64, 64), (4, 96, 96), (4, 128, 128)], ids=["sd15", "sd21", "sdxl"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.gpu
def test_real_shapes_match_the_reference(dtype: str, latent: tuple[int, ...]) -> None:
    arguments = random_arguments(images=3, memory=3, latent=latent, dtype=dtype)
    run = copied(arguments)
    torch.ops.latentrt.guidance_step(**run)
    check_against_reference(arguments, run)


def test_without_guidance_there_is_one_row_an_image() -> None:
    arguments = random_arguments(guided=False)
    run = copied(arguments)
    op.launch(**run)
    check_against_reference(arguments, run)
    assert not run["sample"].isnan().any()


def test_a_kernel_that_is_one_percent_off_is_noticed() -> None:
    arguments = random_arguments(dtype="fp16")
    wrong = copied(arguments)
    wrong["controls"][:, 0] *= 1.01
    op.launch(**wrong)
    with pytest.raises(AssertionError, match=r"state: .* from the float64 result"):
        check_against_reference(arguments, wrong)


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


def test_what_is_not_needed_is_not_read() -> None:
    """NaN in the noise of a row that draws none, in what nobody blends, in unused rows, and in an unguided half."""
    batch = random_arguments(images=2, rows=4)
    batch["controls"][:] = torch.tensor([1.0, 0.5, 0.0])
    batch["table"][:, :, DRAW] = -1
    batch["progress"][:] = torch.tensor([1, 3, 0], dtype=torch.int32)
    batch["table"][:, [0, 3]] = torch.nan
    for name in ("noise", "known"):
        batch[name][:] = torch.nan
    batch["noise_pred"][:2] = torch.nan
    op.launch(**batch)
    assert all(batch[name].isfinite().all() for name in UPDATED)


@pytest.mark.parametrize("clip", [0.0, 1.0], ids=["free", "clamped"])
def test_a_prediction_that_is_not_a_number_is_not_hidden(clip: float) -> None:
    batch = random_arguments()
    batch["table"][:, :, CLIP] = clip
    batch["noise_pred"][:, 0, 0, 0] = torch.nan
    op.launch(**batch)
    assert batch["state"][:, :, 0, 0, 0].isnan().all()


def test_an_image_that_is_done_stays_as_it_is_beside_one_that_is_not() -> None:
    batch = random_arguments(images=3)
    batch["progress"][:, 0] = torch.tensor([3, 1, 2])
    before = copied(batch)
    op.launch(**batch)
    assert batch["progress"].tolist() == [[3, 3, 0], [2, 3, 0], [3, 3, 0]]
    torch.testing.assert_close(batch["state"][0], before["state"][0], rtol=0, atol=0)
    assert not torch.equal(batch["state"][1], before["state"][1])
    assert not torch.equal(batch["state"][2], before["state"][2])
    written = [not batch["timestep"][row].isnan().item() for row in range(6)]
    assert written == [False, True, False] * 2, "after its last row an image has no next input"
    assert [not batch["sample"][row].isnan().all().item() for row in range(6)] == written


def test_noise_is_kept_for_as_many_draws_as_there_is_room() -> None:
    """One slot that is filled before every step gives what all draws in advance give."""
    many = random_arguments(rows=4, draws=4)
    one = copied(many)
    for i in range(3):
        one["progress"][:, 0] = many["progress"][:, 0] = i
        one["noise"] = many["noise"][:, i:i + 1].clone()
        op.launch(**many)
        op.launch(**one)
        torch.testing.assert_close(one["state"], many["state"], rtol=0, atol=0)


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


def test_pack_puts_every_number_where_the_kernel_looks() -> None:
    table = make_table(STABLE, 4, scheduler="dpm++_2m_sde")
    packed = pack(table, 3, 9)
    assert packed.shape == (9, width(3)) == (9, MIX + 4 * 7)
    assert not packed[table.rows:].any()
    scalars = [table.timesteps[2], table.input_scale[2], *table.predict[2], table.clip[2], 2, table.signal[2],
               table.sigma[2]]
    np.testing.assert_array_equal(packed[2, :MIX], np.array(scalars, np.float32))
    mix = packed[2, MIX:].reshape(4, 7)  # columns x, p, s1, s2, s3, noise, m
    np.testing.assert_array_equal(mix[:2][:, [0, 1, 2, 5, 6]], table.mix[2].astype(np.float32))
    assert not mix[2:].any()
    assert not mix[:, 3:5].any()


def test_pack_counts_the_draws_before_a_row() -> None:
    table = make_table(STABLE, 4, scheduler="lcm")
    assert table.draws.tolist() == [True, True, True, False]
    assert pack(table, 1)[:, DRAW].tolist() == [0, 1, 2, -1]


def test_memory_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got 3 arrays of memory, expected at most 1; give the batch .* 3"):
        pack(make_table(STABLE, 4, scheduler="lms"), 1)
    with pytest.raises(ValueError, match="got 8 arrays of memory, expected at most 7"):
        fitting_memory(8)


WRONG = {
    "state of two arrays of memory": ("state", lambda t: t[:, :3], ValueError, "state: got shape .* pad it"),
    "state in 16 bits": ("state", lambda t: t.half(), TypeError, r"state: got torch.float16, expected torch.float32"),
    "state with gaps": ("state", lambda t: t.transpose(3, 4).contiguous().transpose(3, 4), ValueError, "contiguous"),
    "noise_pred of three rows": ("noise_pred", lambda t: t[:3], ValueError, "noise_pred: got shape .* negative"),
    "noise_pred in 64 bits": ("noise_pred", lambda t: t.double(), TypeError, "sample: got torch.float32"),
    "noise without draws": ("noise", lambda t: t[:, :0], ValueError, "with at least one draw"),
    "noise of another size": ("noise", lambda t: t[..., :-1], ValueError, "noise: got shape"),
    "table of another memory": ("table", lambda t: t[..., :-1], ValueError, "table: got shape .*step_table.pack"),
    "controls without blending": ("controls", lambda t: t[:, :2], ValueError, "controls: got shape"),
    "known without a mask": ("known", lambda t: t[:, :2], ValueError, "known: got shape"),
    "sample of another dtype": ("sample", lambda t: t.half(), TypeError, "sample: got torch.float16"),
    "timestep of whole numbers": ("timestep", lambda t: t.long(), TypeError, "timestep: got torch.int64"),
    "progress in 64 bits": ("progress", lambda t: t.long(), TypeError, "progress: got torch.int64"),
    "progress elsewhere": ("progress", lambda t: t.to("meta"), ValueError, "progress: got a tensor on meta, expected"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_the_kernel_cannot_take_is_refused(case: str) -> None:
    name, change, error, message = WRONG[case]
    arguments = random_arguments()
    arguments[name] = change(arguments[name])
    before = copied({k: v for k, v in arguments.items() if v.device.type != "meta"})
    for run in (op.launch, torch.ops.latentrt.guidance_step):
        with pytest.raises(error, match=message):
            run(**arguments)
    for k, v in before.items():
        torch.testing.assert_close(arguments[k], v, rtol=0, atol=0, equal_nan=True)


def test_the_operator_on_a_cpu_is_the_reference() -> None:
    arguments = {name: t.cpu() for name, t in random_arguments(dtype="bf16").items()}
    expected = copied(arguments)
    op.reference(**expected)
    torch.ops.latentrt.guidance_step(**arguments)
    for name in (*UPDATED, "progress"):
        torch.testing.assert_close(arguments[name], expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_opcheck(guided: bool) -> None:
    torch.library.opcheck(torch.ops.latentrt.guidance_step.default, (), random_arguments(guided=guided))


def test_every_variant_is_what_the_launcher_would_launch() -> None:
    found = {(v.signature["noise_pred_ptr"], v.constants["MEMORY"]): v for v in op.variants()}
    assert len(found) == len(DTYPES) * len(MEMORIES)
    for (_, memory), variant in found.items():
        assert (variant.constants["BLOCK"], variant.constants["CHUNK"], variant.num_warps) == (
            op.block(int(memory)), op.CHUNK, op.NUM_WARPS)
        assert variant.signature["sample_ptr"] == variant.signature["noise_pred_ptr"]


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
