"""The loop over slots: jobs that differ in everything against each alone in numpy, on every place that it can run here.

What runs on a GPU differs from `TorchHost` in where the arrays are and in who compiled the ops
(tests/runtime/devices/test_cuda.py).
"""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest

from runtime import Pipeline, Request
from runtime.devices.bound import BoundEngine, layout
from runtime.devices.device import Device
from runtime.devices.host import Host
from runtime.loop.job import Job
from runtime.loop.loop import Loop
from runtime.loop.slots import AHEAD, Capacity
from runtime.request.control import Conditions
from tests.cases.devices import (
    LATENT,
    Deferred,
    TorchHost,
    Wave,
    Waves,
    expected,
    expected_video,
    job,
    mixed,
    run,
    video,
    waves,
)
from tests.conftest import Lazy
from tests.tolerances import BATCH_IMAGE_MAX, SCHEDULER_REL

PLACES = {"numpy": Host, "torch": TorchHost, "deferred": Deferred}


@pytest.fixture(params=PLACES)
def device(request: pytest.FixtureRequest) -> Device:
    return PLACES[request.param]()


def check(done: Job, truth: np.ndarray) -> None:
    error = np.abs(done.latents - truth).max() / np.abs(truth).max()
    assert error < SCHEDULER_REL, f"job {done.request_index}: {error:.1e}, expected less than {SCHEDULER_REL}"


@pytest.mark.parametrize("count", [1, 3])
def test_jobs_that_differ_in_everything_end_where_each_ends_alone(device: Device, count: int) -> None:
    """They enter and leave at any step, so that slots hold any mixture, and the UNet of one row an image runs too."""
    jobs, alone = mixed(), mixed()
    assert {j.table.slots for j in jobs} == {0, 1, 3, 5} and any(j.table.draws.any() for j in jobs)
    engines = Waves(device)
    run(Loop(engines, count), jobs)
    for done, single in zip(jobs, alone, strict=True):
        assert done.row == done.table.rows
        check(done, expected(single))
    if count == 1:
        runs = {rows: len(cast(Wave, engines.unet(rows).engine).rows_run) for rows in (1, 2)}
        assert runs == {rows: sum(j.table.rows for j in alone if j.request.guided == (rows == 2)) for rows in (1, 2)}


def controls(index: int, rows: int) -> dict[str, Conditions]:
    """Of every second image a net that is used in the later half, of every third one that always is."""
    rng, used = np.random.default_rng(index), {}
    if index % 2:
        used["late"] = (np.arange(rows) >= rows // 2) * np.float32(0.7)
    if index % 3 == 0:
        used["soft"] = np.full(rows, -0.4, np.float32)
    return {name: Conditions({"hint": rng.uniform(-0.3, 0.3, (2, 5)).astype(np.float32)},
                             {"timestep": np.zeros(rows, np.float32), "scale": scale.astype(np.float32)})
            for name, scale in used.items()}


def test_images_with_other_control_nets_end_where_each_ends_alone(device: Device) -> None:
    """A net runs in the steps that need it, for every slot, and does nothing to the images that do not use it."""
    jobs, alone = mixed(), mixed()
    for group in (jobs, alone):
        for i, one in enumerate(group):
            one.control = controls(i, one.table.rows)
            for net in one.control.values():
                net.time["timestep"][...] = one.time["timestep"]
    assert {tuple(sorted(j.control)) for j in jobs} == {(), ("late",), ("soft",), ("late", "soft")}
    run(Loop(Waves(device), 2), jobs)
    for done, single in zip(jobs, alone, strict=True):
        check(done, expected(single))
    without = mixed()
    assert max(np.abs(done.latents - expected(one)).max() for done, one in zip(jobs, without, strict=True)) > 0.1


@pytest.mark.parametrize("count", [1, 2, 5])
def test_frames_of_videos_end_where_they_end_one_after_another(device: Device, count: int) -> None:
    """Two videos and other images, some with ControlNets; frames of one video run side by side, a step apart."""
    def made() -> tuple[list[Job], list[Job], list[Job]]:
        others = [job(7, seed=70), job(8, seed=80, steps=2, guidance=1.0), job(9, seed=90, steps=6)]
        others[2].control = controls(1, others[2].table.rows)
        others[2].control["late"].time["timestep"][...] = others[2].time["timestep"]
        return video(0, guidance=4.0, steps=5), video(1, guidance=1.0, scheduler="euler_ancestral"), others

    ours, truth = made(), made()
    widths = set()

    def unet(rows: int, variant: str = "") -> BoundEngine:
        widths.add(sum(0 < one.row < one.table.rows for one in ours[0]))
        return waves_of(rows, variant)

    waves_of, jobs = waves(device), [*ours[0], *ours[2], *ours[1]]
    run(Loop(Waves(device, unet=unet), count), jobs)
    assert max(widths) >= min(count, 3), "frames of one video do not run side by side"
    for group in range(2):
        for done, latents in zip(ours[group], expected_video(truth[group]), strict=True):
            check(done, latents)
    for done, single in zip(ours[2], truth[2], strict=True):
        check(done, expected(single))
    alone = video(0, guidance=4.0, steps=5)
    assert np.abs(ours[0][2].latents - expected(alone[2])).max() > 0.1, "frames do not see each other"


def test_a_wrong_number_is_noticed(device: Device) -> None:
    """The mutation that must fail: one percent more of one input of the UNet that depends on the timestep."""
    jobs, alone = [job(0, seed=1)], job(0, seed=1)
    jobs[0].time["features"][:, 3] *= 1.01
    run(Loop(Waves(device), 2), jobs)
    with pytest.raises(AssertionError, match=r"job 0: .* expected less than"):
        check(jobs[0], expected(alone))


def test_slots_are_used_again_by_other_jobs(device: Device) -> None:
    """Later calls with fewer jobs, shorter tables and other memory leave nothing of earlier ones."""
    loop = Loop(Waves(device), 2)
    run(loop, mixed())
    for seeds in ((1, 2, 3), (4,)):
        jobs = [job(s, seed=s, steps=2 + s, scheduler="lms" if s % 2 else "euler_ancestral") for s in seeds]
        run(loop, jobs)
        for done in jobs:
            i = done.request_index
            check(done, expected(job(i, seed=i, steps=2 + i, scheduler="lms" if i % 2 else "euler_ancestral")))


def test_a_callback_sees_the_latents_of_its_step_and_can_stop(device: Device) -> None:
    seen: list[np.ndarray] = []
    watched = job(0, seed=5, on_step=lambda step: None)
    other = job(1, seed=6, steps=7, guidance=1.0)

    def after_step(done: Job) -> None:
        if done is watched:
            seen.append(done.latents.copy())
            done.cancelled = done.row == 3

    watched.after_step = other.after_step = after_step
    run(Loop(Waves(device), 2), [watched, other])
    assert (watched.row, other.row) == (3, other.table.rows)
    for step, latents in enumerate(seen, 1):
        np.testing.assert_allclose(latents, expected(job(0, seed=5), step), atol=1e-4, rtol=0)
    np.testing.assert_array_equal(watched.latents, seen[-1])
    check(other, expected(job(1, seed=6, steps=7, guidance=1.0)))


def test_after_an_exception_the_slots_are_empty_again(device: Device) -> None:
    loop = Loop(Waves(device), 2)

    def fail(done: Job) -> None:
        if done.row == 2:
            raise RuntimeError("mine")

    failing = [job(0), job(1)]
    for one in failing:
        one.after_step = fail
    with pytest.raises(RuntimeError, match="mine"):
        run(loop, failing)
    after = job(2, seed=9)
    assert run(loop, [after]) == [*failing, after]
    assert all(isinstance(one.error, RuntimeError) for one in failing) and after.error is None
    check(after, expected(job(2, seed=9)))


def test_the_host_waits_for_no_step_that_it_has_just_enqueued() -> None:
    """Only for one so far back that the device has work left; what a job ends with is fetched when all have ended."""
    device = Deferred()
    jobs = [job(i, seed=i, steps=12, scheduler="euler_ancestral") for i in range(2)]
    behind: list[int] = []
    for one in jobs:
        one.after_step = lambda done: behind.append(len(device.waits))
    run(Loop(Waves(device), 2), jobs)
    during = device.waits[:behind[-1]]
    rows = jobs[0].table.rows
    uploads = 2  # the noise of both jobs, between one step and the next
    assert during == [AHEAD * (1 + uploads)] * (rows - AHEAD)


def test_capacity_is_the_largest_of_what_jobs_need() -> None:
    jobs = [job(0, steps=40), job(1, steps=5, scheduler="lms")]
    assert Capacity.of(jobs) == Capacity(3, 64, LATENT, (("timestep", 1), ("features", 70)))


def test_engine_buffers_are_aligned_apart_and_in_one_block() -> None:
    engine = Wave(3)
    bound = BoundEngine(engine)
    offsets, size = layout([*engine.inputs.values(), *engine.outputs.values()])
    assert bound.offsets == offsets and all(offset * 4 % 256 == 0 for offset in offsets.values())
    assert bound.arena.shape == (size,)
    for k, (name, buffer) in enumerate(bound.buffers.items(), 1):
        buffer[...] = k
        assert (bound.arena[offsets[name]:][:buffer.size] == k).all()
    assert all((buffer == k).all() for k, buffer in enumerate(bound.buffers.values(), 1)), "buffers overlap"


def test_a_pipeline_draws_the_same_through_torch_operators(bundles: Lazy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt to pixels with the real UNet: the ops that a GPU runs, on torch's CPU implementation."""
    requests = [Request("a cat", seed=1, steps=4, scheduler="euler_ancestral"),
                Request("a hill", seed=3, steps=3, guidance_rescale=0.5)]
    pictures: list[np.ndarray] = []
    for place in (Host, TorchHost):
        monkeypatch.setattr("runtime.networks.shelf.Host", place)
        results = Pipeline.load(bundles["sd1"], "onnxruntime", size=(64, 64))(requests)
        pictures.append(np.stack([np.asarray(image) for result in results for image in result.images]))
    difference = np.abs(pictures[0].astype(int) - pictures[1])
    assert difference.max() <= 1 + 255 * BATCH_IMAGE_MAX and (difference > 0).mean() < 0.01
