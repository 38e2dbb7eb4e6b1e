"""`python -m export`: the command line of `export.export` and of `export.attach`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import engines
from engines import store
from engines.bundle import Bundle
from engines.cli.interrupt import interruptible
from engines.cli.kernel_options import kernel_options
from engines.spec import EngineConfig, EngineError
from export.attach import attach, detach
from export.bundle import export
from export.errors import ExportError
from export.options import impossible, make_parser

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m export") -> int:
    """Run the command line; returns the exit status: 0, 2 for what the user can put right, 130 for Ctrl-C."""
    parser = make_parser(prog)
    options = parser.parse_args(arguments)
    if wrong := impossible(options):
        parser.error(wrong)
    logging.basicConfig(level=logging.ERROR if options.quiet else logging.WARNING, format="%(message)s")
    for package in ("export", "engines") if options.verbose else ():
        logging.getLogger(package).setLevel(logging.INFO)
    try:
        with interruptible():
            bundle, names = _run(options)
    except (ExportError, EngineError, OSError, ValueError) as e:
        if options.verbose:
            logger.exception("export failed")
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was kept", file=sys.stderr)
        return 130
    if not options.quiet:
        print(f"{bundle.path}: {bundle.manifest.family}, {bundle.dtype}")
        for name in names:
            rms = bundle.component(name).check.rel_rms
            print(f"  {name:{max(map(len, names))}} differs from PyTorch by {rms:.1e} (relative RMS)")
        if options.into:
            print(f"  ControlNets: {', '.join(bundle.labels) or 'none'}")
    return 0


def _run(options: argparse.Namespace) -> tuple[Bundle, list[str]]:
    """Do what the options say; returns the bundle, and the names of the components that were made."""
    if options.detach:
        return detach(options.detach, options.into), []
    own = kernel_options(options)
    build = options.backend or ("auto" if options.size or options.batch or own else "none")
    dtype = options.dtype if options.dtype != "auto" else "fp16" if options.gpu else "fp32"
    device = "cpu"
    if build != "none":  # before the long part: a missing backend, or a GPU it has no code for, shows at once
        from engines.store.choose import choose

        engine, computes, device, why = choose(build, options.dtype, device=options.gpu or "auto",
                                               build=options.gpu is not None)
        graph = computes if device == "cpu" else dtype
        engines.backend(engine).versions(EngineConfig(engine, dtype=graph, device=device, options=own))
        if device != "cpu":
            computes = "auto"  # as each graph is: XL's VAE is bf16 in an fp16 bundle
        if build == "auto" and not options.quiet:
            print(f"auto: {engine} {computes} on {device}: {why}", file=sys.stderr)
    if options.into:
        before = Bundle.open(options.into).manifest.components
        bundle = attach(options.checkpoint, options.into, options.name, encoder=options.encoder, config=options.config,
                        progress=not options.quiet)
        names = [name for name, made in bundle.manifest.components.items() if before.get(name) != made]
    else:
        bundle = export(options.checkpoint, options.output, force=options.force, progress=not options.quiet,
                        dtype=dtype, config=options.config, tokenizer=options.tokenizer)
        names = list(bundle.manifest.components)
    if build != "none":
        store.build_all(bundle, engine, sizes=options.size or (), batches=options.batch or (1,), dtype=computes,
                          device=device, options=own)
    return bundle, names


if __name__ == "__main__":
    sys.exit(main())
