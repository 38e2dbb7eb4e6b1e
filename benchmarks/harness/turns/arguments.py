"""Options of every benchmark that measures in turn, and what they ask for."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import engines
from benchmarks.harness import charts, measure, random_model
from benchmarks.harness.turns.contender import Contender, Workload
from engines import Bundle
from engines.cli.options import picture_size, positive


def add_arguments(parser: argparse.ArgumentParser, contenders: Sequence[str], rounds: int, seconds: float,
                  least: int, families: Sequence[str] = random_model.FAMILIES) -> None:
    """Add the options to a command. families: the models that --random can make for it."""
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
    """Return the contenders that were asked for and the reference; by default all that can run here on such a graph.

    graph: precision of the bundle's graph. dtype: contenders that compute in another are left out.
    """
    names = set(args.only or (name for name, c in contenders.items() if _takes_part(c, graph, dtype)))
    return {name: contenders[name] for name in contenders if name in names - set(args.without) | {reference}}


@contextlib.contextmanager
def opened(args: argparse.Namespace, component: str = "unet") -> Iterator[Workload]:
    """Yield the workload that the arguments describe, for which there is memory. Raises ValueError or EngineError."""
    if args.chart:
        if args.chart.suffix.lower() != ".png":
            raise ValueError(f"--chart: got {args.chart}, expected a name that ends in .png")
        charts.require()
    bundle, checkpoint = _model(args)
    model = Bundle.open(bundle)
    height, width = args.size or model.manifest.default_size
    model.check_size(height, width)
    with tempfile.TemporaryDirectory(prefix="latentrt-benchmark-", ignore_cleanup_errors=True) as cache:
        workload = Workload(bundle, checkpoint, height, width, args.batch, Path(cache), component=component,
                            device=args.device)
        measure.require_memory(round(measure.SHARE * workload.float_bytes), f"{model.manifest.family}'s {component}")
        yield workload


def _model(args: argparse.Namespace) -> tuple[Path, Path]:
    """Return (bundle, checkpoint): those that were named, or random ones."""
    if args.random:
        if args.bundle:
            raise ValueError(f"got both {args.bundle} and --random {args.random}, expected one; leave out the other")
        if args.random not in args.families:
            raise ValueError(f"--random: got {args.random!r}, expected one of {', '.join(args.families)}")
        dtype = args.dtype or ("fp16" if args.device == "cuda" else "")
        return random_model.make(args.random, dtype=dtype)
    if not (args.bundle and args.checkpoint):
        raise ValueError("got no model, expected BUNDLE and CHECKPOINT, or --random "
                         f"{{{','.join(args.families)}}} for weights that need no download")
    if not (args.checkpoint / "unet" / "config.json").is_file():
        raise ValueError(f"{args.checkpoint}: got no unet/config.json, expected the diffusers folder that "
                         f"{args.bundle} was exported from")
    return args.bundle, args.checkpoint


def _takes_part(contender: Contender, graph: str, dtype: str | None) -> bool:
    """Return whether a contender can run here. What another's lacks shows when it starts."""
    if contender.graph not in (None, graph) or (dtype and contender.dtype not in (None, dtype)):
        return False
    if contender.backend is None:
        return True
    backend = engines.backend(contender.backend)
    return (backend.available() is None and contender.dtype in backend.dtypes()
            and (not backend.on_gpu or contender.dtype == graph))
