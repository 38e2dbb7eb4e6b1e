"""python -m kernels {build,list}: compile our GPU kernels ahead of time, and see what there is."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernels.aot.artefact import ARCHS, KernelError, artefacts
from kernels.aot.build import build
from kernels.aot.plan import OPS, variants_of

OUTPUT = Path("build/kernels")

EXAMPLES = f"""examples:
  python -m kernels build                                every kernel for every GPU into {OUTPUT}
  python -m kernels build --arch sm_80,sm_90 -j 4        A100 and H100 or H200 only, four processes
  python -m kernels build --op to_image -o /tmp/kernels  one operator
  python -m kernels list                                 what can be built
  python -m kernels list {OUTPUT} --json            what was built: entry, arguments, block, shared memory

architectures: sm_75 Turing (T4, RTX 20) · sm_80 A100 · sm_86 RTX 30, A10 · sm_89 RTX 40, L4 · sm_90 H100, H200 ·
sm_100 B200 · sm_120 RTX 50

No GPU is needed: Triton brings the compilers. Building what is already in the cache takes seconds; the same sources
give the same bytes. DIR/sm_90/NAME.json says how to launch NAME.*.cubin, and NAME.*.ptx is the same
kernel as text.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for an error, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    try:
        return options.run(options)
    except KernelError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was compiled is kept in the cache, and nothing in the output is half-written",
              file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0


def _build(options: argparse.Namespace) -> int:
    start = time.perf_counter()
    built = build(options.output, archs=options.arch, ops=options.op, cache=options.cache, processes=options.jobs)
    seconds = time.perf_counter() - start
    unfit = sorted(f"{a.arch}/{a.name}" for a in built.unfit)
    if options.json:
        print(json.dumps({"output": str(options.output), "artefacts": len(built.artefacts), "unfit": unfit,
                          "compiled": built.compiled, "cached": built.cached, "seconds": round(seconds, 3)}))
        return 0
    print(f"{len(built.artefacts)} artefacts in {options.output}: {built.compiled} compiled, {built.cached} from the "
          f"cache, {seconds:.1f} s")
    if unfit:
        print(f"left out, since their GPU has not enough shared memory: {', '.join(unfit)}")
    return 0


def _list(options: argparse.Namespace) -> int:
    if options.directory:
        _list_built(options)
    else:
        _list_variants(options)
    return 0


def _list_built(options: argparse.Namespace) -> None:
    found = [artefact for artefact in artefacts(options.directory) if artefact.op in options.op]
    if options.json:
        print(json.dumps([artefact.to_json() for artefact in found], indent=1))
    else:
        _table(["arch", "name", "entry", "threads", "shared", "cubin"],
               [[a.arch, a.name, a.entry, a.block[0], f"{a.shared} B", f"{len(a.code('cubin'))} B"] for a in found])


def _list_variants(options: argparse.Namespace) -> None:
    variants = [variant for op in options.op for variant in variants_of(op).values()]
    rows = [[v.op, v.name, ", ".join(f"{name}: {kind}" for name, kind in v.signature.items()),
             [arch for arch in ARCHS if arch in v.archs]] for v in variants]
    if options.json:
        print(json.dumps([dict(zip(("op", "name", "signature", "archs"), row, strict=True)) for row in rows], indent=1))
    else:
        _table(["op", "name", "from", "arguments"],
               [[op, name, f"sm_{archs[0]}", types] for op, name, types, archs in rows])


def _table(header: list[str], lines: list[list[Any]]) -> None:
    """Print columns, each as wide as its longest cell."""
    cells = [header, *([str(c) for c in line] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join([*(c.ljust(w) for c, w in zip(line[:-1], widths, strict=False)), line[-1]]))


def _archs(text: str) -> list[int]:
    names = {f"sm_{arch}": arch for arch in ARCHS}
    try:
        return sorted({names[name.strip()] for name in text.split(",")})
    except KeyError as e:
        raise argparse.ArgumentTypeError(f"got {e.args[0]!r}, expected some of {','.join(names)}") from e


def _ops(text: str) -> list[str]:
    chosen = [name.strip() for name in text.split(",")]
    if unknown := [name for name in chosen if name not in OPS]:
        raise argparse.ArgumentTypeError(f"got {', '.join(unknown)}, expected some of {','.join(OPS)}")
    return list(dict.fromkeys(chosen))


def _jobs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kernels", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--op", type=_ops, default=OPS, metavar="NAMES",
                        help=f"only these operators (default: {','.join(OPS)})")
    shared.add_argument("--json", action="store_true", help="print JSON")
    shared.add_argument("-v", "--verbose", action="store_true", help="say what is being done")
    commands = parser.add_subparsers(required=True, metavar="{build,list}")

    text = "compile kernels to PTX and cubin with a JSON signature each; needs torch and triton, but no GPU"
    sub = commands.add_parser("build", parents=[shared], help=text, description=text, epilog=EXAMPLES,
                              formatter_class=argparse.RawDescriptionHelpFormatter)
    sub.set_defaults(run=_build)
    sub.add_argument("--arch", type=_archs, default=ARCHS, metavar="NAMES",
                     help=f"GPU architectures (default: {','.join(f'sm_{arch}' for arch in ARCHS)})")
    sub.add_argument("-o", "--output", type=Path, default=OUTPUT, metavar="DIR", help=f"where to (default: {OUTPUT})")
    sub.add_argument("-j", "--jobs", type=_jobs, default=0, metavar="N", help="processes (default: one per CPU)")
    sub.add_argument("--cache", type=Path, metavar="DIR",
                     help="where compiled kernels are kept (default: ~/.cache/latentrt/kernels)")

    text = "list the variants that can be built, or with DIR the artefacts that were"
    sub = commands.add_parser("list", parents=[shared], help=text, description=text)
    sub.set_defaults(run=_list)
    sub.add_argument("directory", nargs="?", type=Path, metavar="DIR", help="output of a build")
    return parser


if __name__ == "__main__":
    sys.exit(main())
