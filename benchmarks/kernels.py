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
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from benchmarks.harness import measure
from benchmarks.harness.kernels import figures
from engines.cli.options import positive

if TYPE_CHECKING:
    from benchmarks.harness.kernels.bench import Bench, Setting

OPS = ("attention", "group_norm", "layer_norm", "geglu", "guidance_step", "to_image")
"""Names of the ops; `benchmarks.harness.kernels.ops` has their shapes and contenders, and needs torch."""
DTYPES = {"cpu": ("bf16", "fp32"), "cuda": ("fp16", "bf16", "fp32")}
"""Device → precisions that can be timed there."""
ISAS = ("avx2", "avx512", "amx")
TORCH_LIMITS = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
"""Instruction set → environment that torch, oneDNN and MKL read when they are loaded."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
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
    """Check and time the kernels; return the exit status, 1 where one of latentrt's could not be timed."""
    for name in ("torch", "triton"):
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"got no {name}, expected it for references and peers; pip install 'latentrt[benchmarks]'")
    if args.torch_isa:
        if "torch" in sys.modules:
            raise ValueError("--torch-isa: got torch loaded already, expected a new process; run it from a shell")
        os.environ.update(TORCH_LIMITS[args.torch_isa])
    from benchmarks.harness.kernels import ops as known

    setting = _setting(args)
    dtypes = args.dtype or (DTYPES["cpu"] if setting.device == "cpu" else ("fp16",))
    if unknown := [d for d in dtypes if d not in DTYPES[setting.device]]:
        raise ValueError(f"--dtype: got {', '.join(unknown)} on {setting.device}, expected some of "
                         f"{', '.join(DTYPES[setting.device])}")
    ops = [op for op in OPS if op in args.op and (setting.device == "cuda" or known.OPS[op].on_cpu)]
    if left := [op for op in OPS if op in args.op and op not in ops]:
        print(f"left out on a CPU, where we have no kernel for them: {', '.join(left)}")
    work = [(op, case, dtype) for op in ops for dtype in dtypes for case in known.chosen(op, args.case)]
    if not work:
        raise ValueError(f"got nothing to time (--op {' '.join(args.op)} --case {' '.join(args.case)}), expected at "
                         "least one shape; leave --case out for all of them")
    report: dict[str, Any] = {"machine": measure.machine() | _device(setting), "layout": args.layout,
                              "torch_isa": args.torch_isa, "rounds": args.rounds, "results": []}
    try:
        for op, case, dtype in (bar := tqdm(work, desc="kernels", disable=None)):
            bar.set_postfix_str(f"{op} {dtype} {case}")
            report["results"].append(_measure(known.make(op, case, dtype, setting), setting, args))
            if args.json:
                measure.write_json(args.json, report)
    finally:  # also of a run that Ctrl-C ends
        figures.show(report["results"], setting.device)
    return int(any(name.startswith("latentrt") for result in report["results"] for name in result["left_out"]))


def _setting(args: argparse.Namespace) -> Setting:
    import torch

    from benchmarks.harness.kernels.bench import Setting
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
    """Return what `measure.machine` does not know: threads, or the GPU and its software."""
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
    from benchmarks.harness.kernels.bench import Call
    from benchmarks.harness.kernels.checks import checked, reason
    from benchmarks.harness.kernels.samplers import sampler

    left_out: dict[str, str] = {}
    calls = {name: Call(run, bench.inputs) for name, run in checked(bench, left_out).items()}
    samplers: dict[str, Callable[[], float]] = {}
    if any(name in calls for name in bench.ours):
        for name, call in {**calls, **bench.limits()}.items():
            try:
                samplers[name] = sampler(call, setting.device)
            except Exception as e:  # whatever a peer raises, the others are still timed
                left_out[name] = reason(e)
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    start = time.perf_counter()
    for done in range(args.rounds if samplers else 0):
        if done >= 3 and time.perf_counter() - start > args.seconds:
            break
        for name, sample in samplers.items():
            seconds[name].append(sample())
    spreads = {name: measure.spread(values) for name, values in seconds.items()}
    return {"op": bench.op, "case": bench.case, "dtype": bench.dtype, "bytes": bench.moved, "flops": bench.flops,
            "left_out": left_out, "seconds": spreads, "ours": figures.figures(bench, spreads, setting.device)}
