"""The loop as it is stepped: jobs that join while it runs, in lanes of their own, with other weights, from threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from runtime.devices.bound import BoundEngine
from runtime.devices.device import Device
from runtime.devices.host import Host
from runtime.loop.job import Job, Place
from runtime.loop.loop import Loop
from tests.cases.devices import Deferred, TorchHost, Waves, expected, job, mixed, run
from tests.tolerances import SCHEDULER_REL

PLACES = {"numpy": Host, "torch": TorchHost, "deferred": Deferred}


@pytest.fixture(params=PLACES)
def device(request: pytest.FixtureRequest) -> Device:
    return PLACES[request.param]()


def check(done: Job, truth: np.ndarray) -> None:
    error = np.abs(done.latents - truth).max() / np.abs(truth).max()
    assert error < SCHEDULER_REL, f"job {done.request_index}: {error:.1e}, expected less than {SCHEDULER_REL}"


class Noted(Waves):
    """Engines that note which places they are asked for, in order."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.places: list[Place] = []

    def denoiser(self, place: Place, rows: int, variant: str) -> BoundEngine:
        self.places.append(place)
        return super().denoiser(place, rows, variant)


def test_jobs_that_are_submitted_while_the_loop_runs_join_it(device: Device) -> None:
    """One job a step, of every sampler, so that slots grow while others run in them; each ends where it does alone."""
    loop, jobs, alone, ended = Loop(Waves(device), 3), mixed(), mixed(), []
    joined = 0
    for one in jobs:
        before = loop.busy
        loop.submit(one)
        ended += loop.step()
        joined += before
    while loop.busy:
        ended += loop.step()
    assert joined > 10 and set(ended) == set(jobs) and len(ended) == len(jobs)
    for done, single in zip(jobs, alone, strict=True):
        assert done.ended and done.row == done.table.rows
        check(done, expected(single))


def test_a_job_joins_between_two_steps_of_another(device: Device) -> None:
    """The first has not ended when the second begins, and neither notices."""
    loop, first, second = Loop(Waves(device), 2), job(0, seed=1, steps=6), job(1, seed=2, steps=3, scheduler="heun")
    loop.submit(first)
    assert loop.step() == loop.step() == []
    loop.submit(second)
    loop.step()
    assert first.row == 3 and second.row == 1
    run(loop, [])
    check(first, expected(job(0, seed=1, steps=6)))
    check(second, expected(job(1, seed=2, steps=3, scheduler="heun")))


def test_lanes_take_their_steps_in_turn(device: Device) -> None:
    engines, jobs = Noted(device), [job(i, seed=i, steps=4) for i in range(4)]
    for one, size in zip(jobs, ((64, 64), (64, 96), (64, 64), (64, 96)), strict=True):
        one.place = Place(size, 77)
    loop = Loop(engines, 2)
    for one in jobs:
        loop.submit(one)
    loop.step()
    assert [one.row for one in jobs] == [1, 1, 1, 1]
    run(loop, [])
    steps = engines.places[-8:]
    assert {steps[0].size, steps[1].size} == {(64, 64), (64, 96)} and steps[::2] == [steps[0]] * 4
    for i, done in enumerate(jobs):
        check(done, expected(job(i, seed=i, steps=4)))


def test_other_weights_wait_until_the_lanes_are_empty(device: Device) -> None:
    """And what came later waits behind them, so that nobody waits for ever."""
    engines, jobs = Noted(device), [job(i, seed=i, steps=3) for i in range(4)]
    for one, weights in zip(jobs, ("", "red", "", "red"), strict=True):
        one.place = Place((64, 64), 77, (weights,))
    ended = run(Loop(engines, 4), jobs)
    assert ended == jobs
    seen = [place.weights for place in engines.places]
    assert [w for i, w in enumerate(seen) if not i or w != seen[i - 1]] == [("",), ("red",), ("",), ("red",)]


def test_a_job_that_is_cancelled_leaves_before_the_next_step(device: Device) -> None:
    loop, waits = Loop(Waves(device), 1), job(1, seed=2)
    running = job(0, seed=1)
    for one in (running, waits):
        loop.submit(one)
    loop.step()
    running.cancelled = True
    ended = loop.step()
    assert waits.row == 1 and running.row == 1
    ended += run(loop, [])
    assert ended[0] is running and set(ended) == {running, waits}
    np.testing.assert_allclose(running.latents, expected(job(0, seed=1), 1), atol=1e-4, rtol=0)
    late = job(2)
    late.cancelled = True
    assert run(loop, [late]) == [late] and late.row == 0


def test_jobs_come_from_many_threads(device: Device) -> None:
    loop, jobs = Loop(Waves(device), 3), [job(i, seed=i, steps=2 + i % 3) for i in range(24)]

    def submit(which: int) -> None:
        for one in jobs[which::4]:
            loop.submit(one)

    threads = [threading.Thread(target=submit, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    ended: list[Job] = []
    while len(ended) < len(jobs):
        ended += loop.step()
    for thread in threads:
        thread.join()
    assert not loop.busy and set(ended) == set(jobs)
    for i, done in enumerate(jobs):
        check(done, expected(job(i, seed=i, steps=2 + i % 3)))


def test_a_finished_job_is_not_kept_back_by_those_that_run_on() -> None:
    """Where the device is the host; on another it comes when its latents are there, a few steps later."""
    for place, later in ((Host, 0), (Deferred, 5)):
        loop, short, long = Loop(Waves(place()), 2), job(0, seed=1, steps=2), job(1, seed=2, steps=12)
        for one in (short, long):
            loop.submit(one)
        steps = 0
        while not short.ended:
            loop.step()
            steps += 1
        assert steps == short.table.rows + later and not long.done
        run(loop, [])
        check(short, expected(job(0, seed=1, steps=2)))
        check(long, expected(job(1, seed=2, steps=12)))
