"""Contenders measured in turn: each in a process of its own, asleep while another works.

As many as memory holds are started together; a round gives each of them one turn, so that whatever else the machine is
doing meets all of them alike. When the rounds of these are over they end, and the next ones are started. The matrix
rate (`benchmarks.harness.limits`) takes part in every round and shows whether the machine changed in between.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tqdm import tqdm

import engines
from benchmarks.harness import limits, measure, random_model
from engines import Bundle, EngineError
from engines.cli.options import picture_size, positive

Run = Callable[[], Any]
"""One unit of work, such as a step; what it returns goes through a pipe."""

LIMITS = "limits"
SETTLE = 0.2  # seconds after a turn in which the threads of its libraries stop waiting for more work
PATIENCE = 5.0  # seconds in which a process that was asked to end does


@dataclass(frozen=True)
class Job:
    """What every contender of a run is given.

    height, width: pixels. batch: pictures at a time. cache: directory for what a contender keeps between two starts,
    empty before the first. fresh: the first start, which builds what later ones find. component: the largest that
    everyone holds. device: "cpu" or "cuda".
    """

    bundle: Path
    checkpoint: Path
    height: int
    width: int
    batch: int
    cache: Path
    fresh: bool = False
    component: str = "unet"
    device: str = "cpu"


@dataclass(frozen=True)
class Contender:
    """load(job): a Run that has run once and is at full speed. keeps: a second start finds what the first has built.

    backend: of ours, whose engine it is. dtype: what it computes in, where that decides whether it takes part. graph:
    the only precision of a bundle's graph that it can run.
    """

    load: Callable[[Any], Run]
    keeps: bool = False
    backend: str | None = None
    dtype: str | None = None
    graph: str | None = None


@dataclass(frozen=True)
class Timed:
    """What a Run that measures itself returns: seconds of one call, its result, and memory taken on the GPU so far."""

    seconds: float
    result: Any
    gpu_bytes: int = 0


@dataclass
class Measured:
    """What is known of one contender so far.

    build_seconds: first start, with nothing built. load_seconds: a start that finds what was built. Both are from the
    first import to the end of the first call. seconds, results: of every call. peak_bytes: of resident memory, mapped
    weight files included. gpu_bytes: memory taken on the GPU, without CUDA's own context. left_out: the reason, for one
    that could not be measured.
    """

    build_seconds: float | None = None
    load_seconds: float | None = None
    seconds: list[float] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    peak_bytes: int = 0
    gpu_bytes: int = 0
    left_out: str | None = None

    def figures(self) -> dict[str, Any]:
        """Everything but the results, for JSON; timings as their spread in seconds."""
        return {**(measure.spread(self.seconds) if self.seconds else {}), "build_seconds": self.build_seconds,
                "load_seconds": self.load_seconds, "peak_bytes": self.peak_bytes, "gpu_bytes": self.gpu_bytes,
                "left_out": self.left_out}


def add_arguments(parser: argparse.ArgumentParser, contenders: Sequence[str], rounds: int, seconds: float,
                  least: int, families: Sequence[str] = random_model.FAMILIES) -> None:
    """Options of every benchmark that measures in turn. families: that --random can make for it."""
    parser.add_argument("bundle", nargs="?", type=Path, help="exported from CHECKPOINT")
    parser.add_argument("checkpoint", nargs="?", type=Path, help="diffusers folder with the same weights")
    parser.add_argument("--random", metavar="NAME", help="instead of both: the full architecture with random weights, "
                        f"one of {', '.join(families)}; made once, then kept in ~/.cache/latentrt")
    parser.add_argument("--size", type=picture_size, metavar="HxW", help="pixels (default: the model's own)")
    parser.add_argument("--batch", type=positive, default=1, metavar="N",
                        help="pictures at a time (default %(default)s)")
    parser.add_argument("--rounds", type=positive, default=rounds, metavar="N",
                        help="timed calls of each contender (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=seconds, metavar="S",
                        help=f"fewer rounds, but at least {least}, for one that has taken so long (default "
                             "%(default)s)")
    parser.add_argument("--only", nargs="+", choices=contenders, metavar="NAME",
                        help=f"some of: {', '.join(contenders)}")
    parser.add_argument("--without", nargs="+", choices=contenders, default=[], metavar="NAME",
                        help="leave these out, such as one that takes minutes to start")
    parser.add_argument("--no-build", action="store_true", help="leave out the first starts, with nothing built; "
                        "torch.compile then compiles in its only one")
    parser.add_argument("--json", type=Path, metavar="FILE",
                        help="write every figure with machine and versions; rewritten as they come in")
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="draw the medians as bars")
    parser.set_defaults(least=least, families=families, device="cpu", dtype=None)


def chosen(args: argparse.Namespace, contenders: Mapping[str, Contender], reference: str, graph: str = "fp32",
           dtype: str | None = None) -> dict[str, Contender]:
    """Those asked for and the reference; by default all but those that cannot run here, or not on such a graph.

    graph: precision of the bundle's. dtype: leave out who computes in another.
    """
    names = set(args.only or (name for name, one in contenders.items() if _takes_part(one, graph, dtype)))
    return {name: contenders[name] for name in contenders if name in names - set(args.without) | {reference}}


@contextlib.contextmanager
def opened(args: argparse.Namespace, component: str = "unet") -> Iterator[Job]:
    """The job that the arguments describe, whose memory there is. Raises ValueError or EngineError for others."""
    if args.chart:
        if args.chart.suffix.lower() != ".png":
            raise ValueError(f"--chart: got {args.chart}, expected a name that ends in .png")
        from benchmarks.harness import charts

        charts.require()
    if args.random:
        if args.bundle:
            raise ValueError(f"got both {args.bundle} and --random {args.random}, expected one; leave out the other")
        if args.random not in args.families:
            raise ValueError(f"--random: got {args.random!r}, expected one of {', '.join(args.families)}")
        dtype = args.dtype or ("fp16" if args.device == "cuda" else "")
        bundle, checkpoint = random_model.make(args.random, dtype=dtype)
    elif args.bundle and args.checkpoint:
        bundle, checkpoint = args.bundle, args.checkpoint
    else:
        raise ValueError("got no model, expected BUNDLE and CHECKPOINT, or --random "
                         f"{{{','.join(args.families)}}} for weights that need no download")
    if not (checkpoint / "unet" / "config.json").is_file():
        raise ValueError(f"{checkpoint}: got no unet/config.json, expected the diffusers folder that {bundle} was "
                         "exported from")
    model = Bundle.open(bundle)
    height, width = args.size or model.manifest.default_size
    model.check_size(height, width)
    with tempfile.TemporaryDirectory(prefix="latentrt-benchmark-", ignore_cleanup_errors=True) as cache:
        job = Job(bundle, checkpoint, height, width, args.batch, Path(cache), component=component, device=args.device)
        measure.require_memory(round(measure.SHARE * _float_bytes(job)), f"{model.manifest.family}'s {component}")
        yield job


def compare(contenders: Mapping[str, Contender], limit: Contender, job: Job, args: argparse.Namespace,
            report: dict[str, Any], figures: Callable[[dict[str, Measured]], dict[str, Any]],
            show: Callable[[dict[str, Any]], None]) -> int:
    """Measure, fill `report` with the limits and what `figures` makes of all, write and show it; the exit status.

    The file is rewritten as figures come in, and a run that Ctrl-C ends shows what it has.
    """
    def after(found: dict[str, Measured]) -> None:
        report.update(limits=limits_of(found), **figures(found))
        if args.json:
            measure.write_json(args.json, report)

    try:
        measure_in_turn(contenders, limit, job, args, after)
    finally:
        if "results" in report:
            show(report)
            _show_limits(report)
    return int(any(r["left_out"] for name, r in report["results"].items() if name.startswith("latentrt")))


def limits_of(found: Mapping[str, Measured]) -> dict[str, Any]:
    """Work of one call, matrix rates and the seconds that follow from them; empty before the first round."""
    return limits.combine(found[LIMITS].results)


def draw(path: Path, report: Mapping[str, Any], what: str) -> None:
    """Write the chart of the medians; `what`: was measured."""
    from benchmarks.harness import charts

    bars = [charts.Bar(name, r["median"]) for name, r in report["results"].items() if "median" in r]
    if not bars:
        raise EngineError(f"{path}: got no figures, expected those of one contender at least; see what was left out")
    machine = report["machine"]
    floors = {f"floor in {dtype}": seconds for dtype, seconds in report["limits"]["floor_seconds"].items()}
    charts.save(path, sorted(bars, key=lambda bar: bar.value), floors,
                f"{what}\n{report['model']}, {report['size']} pixels, "
                f"{machine.get('gpu') or str(machine['cores']) + ' cores of ' + machine['cpu']}",
                "seconds (less is better)")


def number(value: float | None, form: str, unit: str = "") -> str:
    """A figure in a table; "-" for one that there is not."""
    return "-" if value is None else f"{value:{form}}{unit}"


def measure_in_turn(contenders: Mapping[str, Contender], limit: Contender, job: Job, args: argparse.Namespace,
                    after: Callable[[dict[str, Measured]], None]) -> dict[str, Measured]:
    """Measure all contenders and the limits (as LIMITS); `after` hears of the figures whenever there are new ones.

    The dictionary that `after` is given is the one that is returned; it stays valid when Ctrl-C ends the run.
    """
    found = {name: Measured() for name in (LIMITS, *contenders)}
    room = 2 * _float_bytes(job)
    fits: Callable[[], bool] = lambda: measure.free_memory() > room and (  # noqa: E731
        job.device == "cpu" or measure.free_gpu_memory() > room)
    waiting = list(contenders)
    starts = sum(1 + (c.keeps and not args.no_build) for c in contenders.values())
    with tqdm(total=starts + args.rounds * len(contenders), disable=None) as bar:
        while waiting:
            workers: dict[str, Worker] = {}
            try:
                _start(LIMITS, limit, job, True, workers, found, bar)
                while waiting and (len(workers) < 2 or fits()):
                    name = waiting.pop(0)
                    _start(name, contenders[name], job, args.no_build, workers, found, bar)
                    after(found)
                for _ in range(args.rounds):
                    for name in list(workers):
                        own = found[name]
                        if len(own.seconds) < args.least or sum(own.seconds) < args.seconds:
                            _turn(name, workers, own, bar)
                        bar.update(name != LIMITS)
                    after(found)
            finally:
                for worker in workers.values():
                    worker.close()
    return found


class WorkerError(RuntimeError):
    """A contender that could not start or run; the message is its own."""


class Worker:
    """A contender in its own process: loads on creation, then runs once whenever it is asked to.

    Raises WorkerError where it cannot.
    """

    def __init__(self, load: Callable[[Any], Run], job: Job, bar: tqdm) -> None:
        self._bar = bar
        self._busy = True
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, load, job), daemon=True)
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
        """Seconds of one call, and its result."""
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


def _takes_part(contender: Contender, graph: str, dtype: str | None) -> bool:
    """What is missing for another's contender shows when it starts."""
    if contender.graph not in (None, graph) or (dtype and contender.dtype not in (None, dtype)):
        return False
    if contender.backend is None:
        return True
    module = engines.backend(contender.backend)
    return (module.available() is None and contender.dtype in module.dtypes()
            and (not module.on_gpu or contender.dtype == graph))


def _start(name: str, contender: Contender, job: Job, built: bool, workers: dict[str, Worker],
           found: dict[str, Measured], bar: tqdm) -> None:
    """Start a contender, twice where it keeps something that is not built yet."""
    job = dataclasses.replace(job, cache=job.cache / name)
    try:
        if contender.keeps and not built:
            bar.set_description(f"{name}: first start")
            first = Worker(contender.load, dataclasses.replace(job, fresh=True), bar)
            found[name].build_seconds = first.load_seconds
            first.close()
            bar.update()
        bar.set_description(f"{name}: start")
        workers[name] = Worker(contender.load, job, bar)
        found[name].load_seconds = workers[name].load_seconds
        found[name].peak_bytes = workers[name].peak_bytes
    except WorkerError as e:
        _leave_out(name, found[name], e)
    bar.update(name != LIMITS)


def _turn(name: str, workers: dict[str, Worker], own: Measured, bar: tqdm) -> None:
    bar.set_description(name)
    try:
        seconds, result = workers[name].run()
    except WorkerError as e:
        workers.pop(name).close()
        _leave_out(name, own, e)
        return
    own.seconds.append(seconds)
    own.results.append(result)
    own.peak_bytes, own.gpu_bytes = workers[name].peak_bytes, workers[name].gpu_bytes
    time.sleep(SETTLE)


def _leave_out(name: str, own: Measured, error: WorkerError) -> None:
    if name == LIMITS:
        raise EngineError(f"the matrix rate could not be measured: {error}") from error
    own.left_out = str(error)


def _serve(pipe: Connection, load: Callable[[Any], Run], job: Job) -> None:
    tqdm.set_lock(threading.RLock())  # bars need no lock between processes, and one that is ended would leave it behind
    try:
        start = time.perf_counter()
        run, result = load(job), None
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


def _float_bytes(job: Job) -> int:
    """The job's component in float32, the largest part of what a contender holds."""
    bundle = Bundle.open(job.bundle)
    component = bundle.component(job.component)
    size = sum(os.path.getsize(bundle.path / file) for file in component.files)
    return size * (1 if component.dtype == "fp32" else 2)


def _show_limits(report: Mapping[str, Any]) -> None:
    if limit := report["limits"]:
        print(f"floor: {limit['flops'] / 1e12:.4g} TFLOP, " + ", ".join(
            f"{dtype} {limit['flop_per_second'][dtype] / 1e12:.3g} TFLOP/s = {seconds:.3g} s"
            for dtype, seconds in limit["floor_seconds"].items()))
    for name, result in report["results"].items():
        if result["left_out"]:
            print(f"left out: {name}: {result['left_out']}")
