"""Kernels: ours, torch's own, torch.compile's and the physical limit at the shapes of real models, in turn, in one run.

examples:
  python -m benchmarks kernels                                       CPU: bf16 and fp32, all shapes, all cores
  python -m benchmarks kernels --op attention --case sd15 --dtype bf16
  python -m benchmarks kernels --isa avx2 amx --threads 1            how much each instruction set brings
  python -m benchmarks kernels --isa avx2 --torch-isa avx2 --dtype fp32    as on a CPU that has AVX2 alone
  python -m benchmarks kernels --device cuda --json kernels.json     GPU: fp16
  python -m benchmarks kernels --device cuda --layout channels_last --op group_norm to_image

How to read it: `share` is the limit's time over ours. The limit is a copy of the bytes that the op must read and write,
or for attention, where that takes longer, its matrix products at the rate of a large product in the same dtype; of both
the 20th percentile. `ratio` is the fastest peer's time over ours: above 1 we win. Small tensors stay in a CPU's caches,
and so do their copies.

Before anything is timed our result is compared with the reference in float64, by the tolerances of the tests; a wrong
kernel is not timed, and the exit status is 1.

On a GPU each contender is a CUDA graph of calls on inputs of their own, together three times the L2 cache or 64 calls,
replayed after other memory has filled the cache: inputs come from memory, and launches cost what they cost in a graph.
On a CPU a sample is the mean of calls one after the other, at least 10 ms of them after as many that do not count: as
in a network, where one library's ops follow each other on cores that are awake. It starts when the threads of the
contender before have gone to sleep; OpenMP's keep a core busy for some milliseconds after each op.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from benchmarks.harness import measure
from engines.cli.options import positive

if TYPE_CHECKING:
    from benchmarks.harness.contenders import Bench, Contender, Run, Setting

OPS = ("attention", "group_norm", "layer_norm", "geglu", "guidance_step", "to_image")
DTYPES = {"cpu": ("bf16", "fp32"), "cuda": ("fp16", "bf16", "fp32")}
ISAS = ("avx2", "avx512", "amx")
TORCH_LIMITS = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
"""Environment that torch, oneDNN and MKL read when they are loaded."""
PEER_RMS = 0.05
"""A peer whose result is further from the truth than this, RMS over RMS, computes something else."""

CPU_SAMPLE = 0.01  # seconds of calls in a sample on a CPU
OTHERS_ASLEEP = 0.03  # seconds after which no library's threads still wait for work on a core


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=list(DTYPES), default="cpu", help="default %(default)s")
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS), metavar="NAME",
                        help=f"some of: {', '.join(OPS)}")
    parser.add_argument("--case", nargs="+", default=[], metavar="TEXT",
                        help="only shapes whose name contains one of these, such as sd15, vae512 or 4096x77")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES["cuda"], metavar="NAME",
                        help="some of fp16, bf16, fp32 (default: bf16 and fp32 on a CPU, fp16 on a GPU)")
    parser.add_argument("--layout", choices=["channels_first", "channels_last"], default="channels_first",
                        help="of images in group_norm and to_image (default %(default)s)")
    parser.add_argument("--isa", nargs="+", choices=ISAS, metavar="NAME",
                        help=f"CPU: instruction sets of our kernels, some of {', '.join(ISAS)} (default: the best)")
    parser.add_argument("--torch-isa", choices=list(TORCH_LIMITS), metavar="NAME",
                        help=f"CPU: hold torch to an instruction set too, one of {', '.join(TORCH_LIMITS)}")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU: of everyone (default: all cores)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, seconds a shape")
    parser.add_argument("--rounds", type=positive, default=30,
                        help="timed samples of each (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=15, metavar="S",
                        help="fewer rounds, but at least 3, where a shape would take longer (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE",
                        help="write every figure with machine and versions; rewritten after each shape")


def run(args: argparse.Namespace) -> int:
    for name in ("torch", "triton"):
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"got no {name}, expected it for references and peers; pip install 'latentrt[benchmarks]'")
    if args.torch_isa:
        if "torch" in sys.modules:
            raise ValueError("--torch-isa: got torch loaded already, expected a new process; run it from a shell")
        os.environ.update(TORCH_LIMITS[args.torch_isa])
    from benchmarks.harness import contenders

    setting = _setting(args)
    dtypes = args.dtype or (DTYPES["cpu"] if setting.device == "cpu" else ("fp16",))
    if unknown := [d for d in dtypes if d not in DTYPES[setting.device]]:
        raise ValueError(f"--dtype: got {', '.join(unknown)} on {setting.device}, expected some of "
                         f"{', '.join(DTYPES[setting.device])}")
    ops = [op for op in OPS if op in args.op and (setting.device == "cuda" or op in contenders.ON_CPU)]
    if left := [op for op in OPS if op in args.op and op not in ops]:
        print(f"left out on a CPU, where we have no kernel for them: {', '.join(left)}")
    work = [(op, case, dtype) for op in ops for dtype in dtypes for case in contenders.chosen(op, args.case)]
    if not work:
        raise ValueError(f"got nothing to time (--op {' '.join(args.op)} --case {' '.join(args.case)}), expected at "
                         "least one shape; leave --case out for all of them")
    report: dict[str, Any] = {"machine": measure.machine() | _device(setting), "layout": args.layout,
                              "torch_isa": args.torch_isa, "rounds": args.rounds, "results": []}
    try:
        for op, case, dtype in (bar := tqdm(work, desc="kernels", disable=None)):
            bar.set_postfix_str(f"{op} {dtype} {case}")
            report["results"].append(_measure(contenders.make(op, case, dtype, setting), setting, args))
            if args.json:
                measure.write_json(args.json, report)
    finally:  # also of a run that Ctrl-C ends
        _print(report["results"], setting)
    return int(any(name.startswith("latentrt") for result in report["results"] for name in result["left_out"]))


def _setting(args: argparse.Namespace) -> Setting:
    import torch

    from benchmarks.harness.contenders import Setting
    from kernels.cpu import library

    threads, isas = args.threads or len(os.sched_getaffinity(0)), tuple(args.isa or ())
    if args.device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device: got cuda, expected cpu on a machine where torch sees no GPU")
        if isas or args.threads or args.torch_isa:
            raise ValueError("got --isa, --torch-isa or --threads with --device cuda, expected --device cpu with them")
    else:
        here = library.isas()
        isas = isas or here[-1:]
        if missing := [isa for isa in isas if isa not in here]:
            raise ValueError(f"--isa: got {', '.join(missing)}, expected some of {', '.join(here)} on this CPU")
        torch.set_num_threads(threads)
    return Setting(device=args.device, compile=not args.no_compile, channels_last=args.layout == "channels_last",
                   threads=threads, isas=isas)


def _device(setting: Setting) -> dict[str, Any]:
    """What `measure.machine` does not know: threads, or the GPU and its software."""
    import torch
    import triton

    if setting.device == "cpu":
        return {"threads": setting.threads}
    wanted = "driver_version,power.limit,clocks.max.sm"
    query = subprocess.run(["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader", "--id=0"],
                           capture_output=True, text=True, check=False).stdout.strip()
    properties = torch.cuda.get_device_properties(0)
    return {"gpu": properties.name, "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size, wanted: query,
            "cuda": torch.version.cuda, "triton": triton.__version__}


def _measure(bench: Bench, setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """Check everyone, time those that pass in turn, and derive rates and ratios."""
    from benchmarks.harness.contenders import Contender

    left_out: dict[str, str] = {}
    runners = {name: Contender(run, bench.inputs) for name, run in _checked(bench, left_out).items()}
    samplers: dict[str, Callable[[], float]] = {}
    if any(name in runners for name in bench.ours):
        for name, contender in {**runners, **bench.limits()}.items():
            try:
                samplers[name] = _sampler(contender, setting.device)
            except Exception as e:  # whatever a peer raises, the others are still timed
                left_out[name] = _reason(e)
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    start = time.perf_counter()
    for done in range(args.rounds if samplers else 0):
        if done >= 3 and time.perf_counter() - start > args.seconds:
            break
        for name, sample in samplers.items():
            seconds[name].append(sample())
    spreads = {name: measure.spread(values) for name, values in seconds.items()}
    return {"op": bench.op, "case": bench.case, "dtype": bench.dtype, "bytes": bench.moved, "flops": bench.flops,
            "left_out": left_out, "seconds": spreads, "ours": _figures(bench, spreads, setting.device)}


def _checked(bench: Bench, left_out: dict[str, str]) -> dict[str, Run]:
    """Ours that are right and peers that compute the same; the others go to `left_out` with the reason."""
    results: dict[str, Any] = {}
    for name, run in {**bench.peers, **bench.ours}.items():
        try:
            result = run(*(t.clone() for t in bench.inputs))
            results[name] = result[0] if isinstance(result, tuple) else result
        except Exception as e:  # no kernel for this shape, no compiler, out of memory: each is a reason to say
            left_out[name] = _reason(e)
    torch_name, *_ = bench.peers
    if torch_name not in results:
        reason = f"not checked, since torch's own op failed: {left_out[torch_name]}"
        left_out.update(dict.fromkeys(bench.ours, reason))
        return {}
    framework = results[torch_name].double()
    for name in list(results):
        try:
            if name in bench.ours:
                bench.verify(results[name], results[torch_name])
            elif (error := _relative_rms(results[name].double(), framework)) > PEER_RMS:
                raise AssertionError(f"differs from {torch_name} by {error:.1%}, expected at most {PEER_RMS:.0%}")
        except AssertionError as e:
            left_out[name] = f"wrong: {e}"
    return {name: run for name, run in {**bench.ours, **bench.peers}.items() if name not in left_out}


def _relative_rms(got: Any, expected: Any) -> float:
    """Infinite for what is not a number."""
    value = float(((got - expected).square().mean() / expected.square().mean()).sqrt())
    return value if math.isfinite(value) else math.inf


def _figures(bench: Bench, spreads: dict[str, dict[str, float]], device: str) -> dict[str, dict[str, Any]]:
    """For each of ours: rate, limit and share of it, fastest peer and ratio to it."""
    if not spreads:
        return {}
    limits = {"copy": spreads["copy"]["p20"]}
    if bench.flops:
        limits["matmul"] = spreads["matmul"]["p20"] * bench.flops / (2 * measure.MATRIX_SIDE[device] ** 3)
    bound = max(limits, key=lambda name: limits[name])
    peers = {name: spreads[name]["median"] for name in bench.peers if name in spreads}
    figures: dict[str, dict[str, Any]] = {}
    for name in bench.ours:
        if name not in spreads:
            continue
        median = spreads[name]["median"]
        figures[name] = {"gb_per_second": bench.moved / median / 1e9, "tflop_per_second": bench.flops / median / 1e12,
                         "limited_by": bound, "limit_seconds": limits[bound], "share": limits[bound] / median}
        if peers:
            fastest = min(peers, key=lambda name: peers[name])
            figures[name] |= {"fastest_peer": fastest, "ratio": peers[fastest] / median}
    return figures


def _sampler(contender: Contender, device: str) -> Callable[[], float]:
    return _sampler_on_gpu(contender) if device == "cuda" else _sampler_on_cpu(contender)


def _sampler_on_cpu(contender: Contender) -> Callable[[], float]:
    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            contender.run(*contender.inputs)
        return (time.perf_counter() - start) / calls

    seconds(1)
    calls = math.ceil(CPU_SAMPLE / seconds(1))

    def sample() -> float:
        time.sleep(OTHERS_ASLEEP)
        seconds(calls)
        return seconds(calls)
    return sample


def _sampler_on_gpu(contender: Contender) -> Callable[[], float]:
    """Seconds of one call, as the module's docstring says. Filling the cache also hides the launch of the graph."""
    import torch

    cache = torch.cuda.get_device_properties(0).L2_cache_size
    size = sum(t.numel() * t.element_size() for t in contender.inputs)
    calls = max(1, min(64, math.ceil(3 * cache / size)))
    sets = [contender.inputs, *(tuple(t.clone() for t in contender.inputs) for _ in range(calls - 1))]
    other = torch.empty(4 * cache, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            contender.run(*sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for inputs in sets:
            kept.append(contender.run(*inputs))  # kept, so that every call writes to memory of its own
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        other.zero_()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls
    sample()
    return sample


def _print(results: Sequence[dict[str, Any]], setting: Setting) -> None:
    """A table for each op and dtype, then what was left out and why."""
    scale, unit = (1e6, "µs") if setting.device == "cuda" else (1e3, "ms")
    for op, dtype in dict.fromkeys((r["op"], r["dtype"]) for r in results):
        group = [r for r in results if (r["op"], r["dtype"]) == (op, dtype)]
        peers = dict.fromkeys(name for r in group for name in (*r["seconds"], *r["left_out"])
                              if not name.startswith("latentrt") and name not in ("copy", "matmul"))
        rows = [_row(result, name, op, list(peers), scale) for result in group for name in result["ours"]]
        if rows:
            print(f"\n{op} {dtype}, {unit}\n{measure.table(rows)}")
    reasons: dict[str, list[str]] = {}
    for r in results:
        for name, reason in r["left_out"].items():
            reasons.setdefault(f"{r['op']} {r['dtype']} {name}: {reason}", []).append(r["case"])
    for reason, shapes in reasons.items():
        print(f"left out: {reason} ({', '.join(shapes)})", file=sys.stderr)


def _row(result: dict[str, Any], name: str, op: str, peers: list[str], scale: float) -> dict[str, str]:
    def text(contender: str, key: str = "median") -> str:
        spread = result["seconds"].get(contender)
        return f"{spread[key] * scale:.4g}" if spread else "-"

    figures = result["ours"][name]
    rate = ({"TFLOP/s": f"{figures['tflop_per_second']:.3g}"} if op == "attention" else
            {"GB/s": f"{figures['gb_per_second']:.4g}"})
    return {"shape": result["case"], "ours": name, "median": text(name), "p20": text(name, "p20"),
            "p80": text(name, "p80"), **rate, "limit": f"{figures['limit_seconds'] * scale:.4g}",
            "by": figures["limited_by"], "share": f"{figures['share']:.0%}", **{peer: text(peer) for peer in peers},
            "ratio": f"{figures['ratio']:.2f} x" if "ratio" in figures else "-"}


def _reason(e: Exception) -> str:
    lines = str(e).strip().splitlines()
    return f"{type(e).__name__}: {lines[0][:200] if lines else 'no message'}"
