"""The GPU as the place of the loop: copies, kernels without triton, CUDA graphs, and that the host waits for nothing.

Needs an NVIDIA GPU and cuda.core; the loop itself is tested everywhere in tests/runtime/loop/test_slots.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import engines
from engines import EngineError
from engines.machine.gpu import gpus
from kernels.calls import OPS
from runtime import Pipeline, Request
from runtime.devices.cuda import Cuda
from runtime.loop.job import Job, Place
from runtime.loop.lane import Lane
from runtime.loop.loop import Loop
from runtime.loop.slots import AHEAD
from tests.cases.devices import Wave, Waves, expected, expected_video, job, mixed, run, video
from tests.conftest import Lazy, why_no_gpu
from tests.tolerances import IMAGE_MAX, SCHEDULER_REL

pytestmark = pytest.mark.gpu
SECOND = 1_500_000_000
"""Clock cycles of about a second."""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runtime's kernels for the GPU that is here."""
    if reason := why_no_gpu():
        pytest.skip(reason)
    pytest.importorskip("cuda.core", reason="cuda.core is not installed")
    directory = tmp_path_factory.mktemp("kernels")
    subprocess.run([sys.executable, "-m", "kernels", "build", "--op", ",".join(OPS), "--arch", gpus()[0].arch,
                    "-o", str(directory)], check=True, cwd=Path(__file__).parents[3])
    return directory


@pytest.fixture(params=["eager", "graphs"])
def device(request: pytest.FixtureRequest, kernels: Path) -> Cuda:
    return Cuda(0, kernels, eager=request.param == "eager")


def latents(device: Cuda, jobs: list[Job], count: int = 3) -> np.ndarray:
    run(Loop(Waves(device, 0), count), jobs)
    return np.stack([done.latents for done in jobs])


def test_frames_of_a_video_end_where_they_end_one_after_another(device: Cuda) -> None:
    """What they leave for each other stays on the GPU."""
    got = latents(device, video(0, guidance=4.0, steps=5))
    truth = np.stack(expected_video(video(0, guidance=4.0, steps=5)))
    assert np.abs(got - truth).max() / np.abs(truth).max() < SCHEDULER_REL


def test_arrays_go_there_and_back(device: Cuda) -> None:
    rng = np.random.default_rng(0)
    array = device.zeros((5, 3, 7), np.float32)
    assert not device.download(array)().any()
    values = rng.standard_normal((5, 3, 7)).astype(np.float32)
    device.upload(array, values)
    waiting = device.download(array[2:4])
    device.upload(array[3], np.zeros((3, 7)))
    np.testing.assert_array_equal(waiting(), values[2:4])  # as it was when it was asked for
    assert not device.download(array)()[3].any()
    torch.cuda.synchronize()
    seen = torch.as_tensor(array[4], device="cuda:0")
    np.testing.assert_array_equal(seen.cpu().numpy(), values[4])
    assert seen.data_ptr() == int(array) + 4 * 3 * 7 * 4


def test_what_is_uploaded_may_change_at_once(device: Cuda) -> None:
    """A hundred uploads behind a busy second: none may read the array later than its call."""
    array, values = device.zeros((100, 1000), np.int32), np.zeros(1000, np.int32)
    with torch.cuda.stream(torch.cuda.ExternalStream(int(device.stream.handle))):
        torch.cuda._sleep(SECOND)
    for i in range(100):
        values[:] = i
        device.upload(array[i], values)
    np.testing.assert_array_equal(device.download(array)(), np.arange(100)[:, None] + np.zeros(1000, int))


@pytest.mark.parametrize("count", [1, 3])
def test_jobs_that_differ_in_everything_end_where_each_ends_alone_in_numpy(device: Cuda, count: int) -> None:
    jobs, alone = mixed(), mixed()
    latents(device, jobs, count)
    for done, single in zip(jobs, alone, strict=True):
        truth = expected(single)
        error = np.abs(done.latents - truth).max() / np.abs(truth).max()
        assert error < SCHEDULER_REL, f"job {done.request_index}: {error:.1e}"


def test_graphs_give_the_bits_that_eager_gives(kernels: Path) -> None:
    eager, graphs = (latents(Cuda(0, kernels, eager=eager), mixed()) for eager in (True, False))
    np.testing.assert_array_equal(eager, graphs)


def test_the_host_enqueues_steps_without_waiting(device: Cuda) -> None:
    """The GPU is kept busy first; the loop must get `AHEAD` steps further, noise and all, before that has ended."""
    engines = Waves(device, 0)
    warm, timed = ([job(i, seed=i, steps=AHEAD - 1, scheduler="euler_ancestral") for i in range(2)] for _ in range(2))
    lane = Lane(engines, 2)
    for group in (warm, [job(3, seed=3, steps=AHEAD - 1)]):
        lane.admit(group)
        while lane.active:
            lane.prepare()
            lane.launch()
            lane.collect()
    lane.admit(timed)
    device.mark()()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(torch.cuda.ExternalStream(int(device.stream.handle))):
            torch.cuda._sleep(SECOND)
        busy = device.stream.record()
        for _ in range(timed[0].table.rows):
            lane.prepare()
            lane.launch()
        assert not busy.is_done, "a step waited for the GPU"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    lane.collect()
    for done in timed:
        again = job(done.request_index, seed=done.request_index, steps=AHEAD - 1, scheduler="euler_ancestral")
        np.testing.assert_allclose(done.latents, expected(again), rtol=0, atol=1e-4)


def test_a_refit_reaches_what_was_captured(device: Cuda) -> None:
    engines = Waves(device, 0)
    loop = Loop(engines, 1)
    for seed in (1, 2):
        run(loop, [job(0, seed=seed)])
    engines.denoiser(Place(), 2, "").refit({"gain": np.array(0.5, np.float32)})
    got, asked = job(0, seed=3), job(0, seed=3)
    run(loop, [got])
    asked.fixed["text"][:, 1, 2] *= 0.5
    np.testing.assert_allclose(got.latents, expected(asked), rtol=0, atol=1e-4)


def test_engines_share_one_block_of_working_memory(device: Cuda) -> None:
    class Shares(Wave):
        def __init__(self, size: int) -> None:
            super().__init__(1)
            self.workspace_bytes = size

        def use_workspace(self, buffer: int) -> None:
            self.address = buffer

    sizes = (1000, 500, 1 << 20, 2000)
    sharing = [Shares(size) for size in sizes]
    for engine in sharing:
        device.adopt(engine)
    assert len({engine.address for engine in sharing}) == 1 and sharing[0].address % 256 == 0


def test_kernels_that_are_not_there_name_the_command(tmp_path: Path) -> None:
    pytest.importorskip("cuda.core", reason="cuda.core is not installed")
    device = Cuda(0, tmp_path)
    x, out = device.zeros((1, 3, 8, 8), np.float32), device.zeros((1, 8, 8, 3), np.uint8)
    with pytest.raises(EngineError, match=r"python -m kernels build --arch sm_\d+"):
        device.kernel("to_image", x=x, out=out)


def backends() -> list[str]:
    """Those that have a GPU here."""
    found = []
    for name in engines.BACKENDS if why_no_gpu() is None else ():
        module = engines.backend(name)
        if name != "onnxruntime" and module.available() is None and "cuda:0" in module.devices():
            found.append(name)
    return found


@pytest.mark.parametrize("backend", backends() or ["none"])
def test_pictures_are_those_of_the_cpu_with_graphs_and_without(backend: str, bundles: Lazy) -> None:
    if backend == "none":
        pytest.skip("no backend for this GPU is installed")
    pytest.importorskip("diffusers", reason="diffusers is not installed, which exports the model")
    requests = [Request("a cat", seed=1, steps=6, scheduler="euler_ancestral", count=3),
                Request("a horse", seed=2, steps=4, guidance=1.0), Request("a hill", seed=3, guidance_rescale=0.5)]
    truth = Pipeline.load(bundles["shapes"], "onnxruntime", device="cpu", dtype="fp32", size=(64, 64))
    cpu = [truth.decode(result.latents) for result in truth(requests)]
    drawn = {}
    for eager in (True, False):
        pipe = Pipeline.load(bundles["shapes"], backend, device="cuda:0", dtype="fp32", size=(64, 64), batch=2,
                             eager=eager)
        results = pipe(requests)
        drawn[eager] = [np.asarray(image) for result in results for image in result.images]
        for result, reference in zip(results, cpu, strict=True):
            np.testing.assert_allclose(truth.decode(result.latents), reference, rtol=0, atol=IMAGE_MAX)
            for image, picture in zip(result.images, reference, strict=True):
                np.testing.assert_allclose(np.asarray(image) / 255, picture, rtol=0, atol=IMAGE_MAX + 0.5 / 255)
    for one, other in zip(drawn[True], drawn[False], strict=True):
        np.testing.assert_array_equal(one, other)

