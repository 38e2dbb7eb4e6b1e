"""Rounds: as many contenders as memory holds are started together, and a round gives each of them one turn.

So whatever else the machine is doing meets all of them alike. When the rounds of these are over they end, and the next
ones are started. The matrix rate (`benchmarks.harness.limits`) takes part in every round and shows whether the machine
changed in between.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Mapping

from tqdm import tqdm

from benchmarks.harness import measure
from benchmarks.harness.turns.contender import Contender, Measured, Workload
from benchmarks.harness.turns.worker import Worker, WorkerError
from engines import EngineError

LIMITS = "limits"
"""Name under which the matrix rate takes part."""
SETTLE = 0.2
"""Seconds after a turn in which the threads of its libraries stop waiting for more work."""


def measure_in_turn(contenders: Mapping[str, Contender], limit: Contender, workload: Workload, args: argparse.Namespace,
                    after: Callable[[dict[str, Measured]], None]) -> dict[str, Measured]:
    """Measure all contenders and the limits (as LIMITS); `after` hears of the figures whenever there are new ones.

    The dictionary that `after` is given is the one that is returned; it stays valid when Ctrl-C ends the run.
    """
    measured = {name: Measured() for name in (LIMITS, *contenders)}
    room = 2 * workload.float_bytes
    waiting = list(contenders)
    starts = sum(1 + (c.keeps and not args.no_build) for c in contenders.values())
    with tqdm(total=starts + args.rounds * len(contenders), disable=None) as bar:
        while waiting:
            workers: dict[str, Worker] = {}
            try:
                _start(LIMITS, limit, workload, True, workers, measured, bar)
                while waiting and (len(workers) < 2 or _fits(room, workload.device)):
                    name = waiting.pop(0)
                    _start(name, contenders[name], workload, args.no_build, workers, measured, bar)
                    after(measured)
                for _ in range(args.rounds):
                    for name in list(workers):
                        so_far = measured[name].seconds
                        if len(so_far) < args.least or sum(so_far) < args.seconds:
                            _turn(name, workers, measured[name], bar)
                        bar.update(name != LIMITS)
                    after(measured)
            finally:
                for worker in workers.values():
                    worker.close()
    return measured


def _fits(room: int, device: str) -> bool:
    return measure.free_memory() > room and (device == "cpu" or measure.free_gpu_memory() > room)


def _start(name: str, contender: Contender, workload: Workload, built: bool, workers: dict[str, Worker],
           measured: dict[str, Measured], bar: tqdm) -> None:
    """Start a contender, twice where it keeps something that is not built yet."""
    workload = dataclasses.replace(workload, cache=workload.cache / name)
    try:
        if contender.keeps and not built:
            bar.set_description(f"{name}: first start")
            first = Worker(contender.load, dataclasses.replace(workload, fresh=True), bar)
            measured[name].build_seconds = first.load_seconds
            first.close()
            bar.update()
        bar.set_description(f"{name}: start")
        workers[name] = Worker(contender.load, workload, bar)
        measured[name].load_seconds = workers[name].load_seconds
        measured[name].peak_bytes = workers[name].peak_bytes
    except WorkerError as e:
        _leave_out(name, measured[name], e)
    bar.update(name != LIMITS)


def _turn(name: str, workers: dict[str, Worker], measured: Measured, bar: tqdm) -> None:
    bar.set_description(name)
    try:
        seconds, result = workers[name].run()
    except WorkerError as e:
        workers.pop(name).close()
        _leave_out(name, measured, e)
        return
    measured.seconds.append(seconds)
    measured.results.append(result)
    measured.peak_bytes, measured.gpu_bytes = workers[name].peak_bytes, workers[name].gpu_bytes
    time.sleep(SETTLE)


def _leave_out(name: str, measured: Measured, error: WorkerError) -> None:
    if name == LIMITS:
        raise EngineError(f"the matrix rate could not be measured: {error}") from error
    measured.left_out = str(error)
