"""`python -m engines build`: engines for static shapes, each checked against the reference."""

from __future__ import annotations

import argparse
import json
import sys

from engines import store
from engines.backend import BACKENDS
from engines.bundle import Bundle
from engines.cli.describe import describe, engine_table
from engines.cli.kernel_options import add_kernel_options, kernel_options
from engines.cli.options import picture_size, positive, setting
from engines.spec import DTYPES
from engines.store.choose import choose

ABOUT = "build the engines of a bundle for static shapes and check each against the fp32 reference"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("bundle", help="bundle directory")
    parser.add_argument("--backend", default="auto", choices=["auto", *BACKENDS],
                        help="default: auto, which `list` explains")
    parser.add_argument("--size", nargs="+", type=picture_size, default=(), metavar="HxW",
                        help="picture sizes (default: the model's)")
    parser.add_argument("--batch", nargs="+", type=positive, default=(1,), metavar="N",
                        help="pictures at a time (default: 1)")
    parser.add_argument("--dtype", choices=("auto", *DTYPES),
                        help="precision to compute in; auto is the backend's choice for this machine, and on a GPU the "
                             "graph's (default: fp32; auto with --backend auto)")
    parser.add_argument("--tokens", type=positive, default=0, metavar="N",
                        help="of the text: 77 for each chunk of a long prompt (default: one prompt's)")
    parser.add_argument("--component", nargs="+", default=(), metavar="NAME", help="only these components")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: the physical cores)")
    parser.add_argument("--device", metavar="NAME",
                        help="cpu, cuda:N or, for a GPU that is elsewhere, its architecture such as sm_89 (default: "
                             "cpu; what is here with --backend auto)")
    add_kernel_options(parser)
    parser.add_argument("--option", action="append", type=setting, default=[], metavar="NAME=VALUE",
                        help="a setting of the backend")
    parser.add_argument("--rebuild", action="store_true", help="build again what is already there")
    parser.add_argument("--no-check", action="store_true", help="skip the comparison with the reference")


def run(options: argparse.Namespace) -> int:
    """Build what was asked for and return the exit status."""
    bundle = Bundle.open(options.bundle)
    name, dtype, device = options.backend, options.dtype, options.device
    if name == "auto":
        name, dtype, device, why = choose(
            "auto", dtype or "auto", bundle=bundle, size=next(iter(options.size), None), batch=options.batch[0],
            device=device or "auto", threads=options.threads, build=device is not None)
        print(f"auto: {name} {dtype} on {device}: {why}", file=sys.stderr)
    paths = store.build_all(
        bundle, name, sizes=options.size, batches=options.batch, dtype=dtype or "fp32", components=options.component,
        rebuild=options.rebuild, check=not options.no_check, tokens=options.tokens, threads=options.threads,
        device=device or "cpu", options={**dict(options.option), **kernel_options(options)})
    engines = [describe(bundle, path) for path in paths]
    print(json.dumps(engines, indent=1) if options.json else engine_table(engines, options.bundle))
    return 0
