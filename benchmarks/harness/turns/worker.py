"""A contender in a process of its own, which sleeps while another works."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from tqdm import tqdm

from benchmarks.harness import measure
from benchmarks.harness.turns.contender import Run, Timed, Workload

PATIENCE = 5.0
"""Seconds in which a process that was asked to end does."""


class WorkerError(RuntimeError):
    """A contender that could not start or run; the message is its own."""


class Worker:
    """A contender in its own process: it loads on creation, then runs once whenever it is asked to.

    Raises WorkerError where it cannot.
    """

    def __init__(self, load: Callable[[Any], Run], workload: Workload, bar: tqdm) -> None:
        self._bar = bar
        self._busy = True
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, load, workload), daemon=True)
        try:
            with _without_interrupts():
                self._process.start()
            theirs.close()
            self.load_seconds, _, self.peak_bytes = self._receive()
            self.gpu_bytes = 0
        except BaseException:
            self.close()
            raise

    def run(self) -> tuple[float, Any]:
        """Return the seconds of one call, and its result."""
        try:
            self._pipe.send(True)
            self._busy = True
        except OSError as e:
            raise WorkerError("its process has ended") from e
        seconds, result, self.peak_bytes = self._receive()
        if isinstance(result, Timed):
            self.gpu_bytes = result.gpu_bytes
            return result.seconds, result.result
        return seconds, result

    def close(self) -> None:
        """End the process: by itself where it waits for its turn, whatever it is doing otherwise."""
        self._pipe.close()
        if not self._busy:
            self._process.join(PATIENCE)
        self._process.terminate()
        self._process.join(PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self) -> Any:
        try:
            while not self._pipe.poll(1.0):
                self._bar.refresh()
            message = self._pipe.recv()
        except (EOFError, OSError) as e:
            self._process.join(PATIENCE)
            raise WorkerError(f"its process ended with status {self._process.exitcode} and without an answer "
                              "(-9 is what the kernel does when memory is out)") from e
        self._busy = False
        if isinstance(message, str):
            raise WorkerError(message)
        return message


def _serve(pipe: Connection, load: Callable[[Any], Run], workload: Workload) -> None:
    tqdm.set_lock(threading.RLock())  # bars need no lock between processes, and one that is ended would leave it behind
    try:
        start = time.perf_counter()
        run, result = load(workload), None
        while True:
            pipe.send((time.perf_counter() - start, result, measure.peak_memory()))
            pipe.recv()
            start = time.perf_counter()
            result = run()
    except (EOFError, BrokenPipeError):
        return  # the parent has ended
    except Exception as e:
        pipe.send(f"{type(e).__name__}: {e}".splitlines()[0])


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes started in this block do not hear Ctrl-C, which a terminal sends to all: this one does and ends them.

    A signal that comes meanwhile is delivered at the end of the block.
    """
    resource_tracker.ensure_running()  # multiprocessing's own; its start would let the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
