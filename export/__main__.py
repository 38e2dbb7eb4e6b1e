"""`python -m export`: the command line of `export.export` and of `export.attach`."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from pathlib import Path

import engines
from engines import store
from engines.bundle import Bundle
from engines.cli.interrupt import interruptible
from engines.cli.kernel_options import add_kernel_options, kernel_options
from engines.cli.options import picture_size, positive
from engines.spec import DTYPES, EngineConfig, EngineError
from export.attach import attach, detach
from export.bundle import export
from export.errors import FAMILIES, ExportError

EXAMPLES = """
examples:
  python -m export stable-diffusion-v1-5 -o sd15.bundle                 a diffusers folder
  python -m export v1-5-pruned.safetensors -o sd15.bundle               one file in the original layout
  python -m export 512-base-ema.ckpt -o sd2.bundle --config sd2-base    a 2.x model that predicts epsilon
  python -m export my-model -o my.bundle --dtype fp16                   half the size, for GPUs
  python -m export my-model -o my.bundle --backend tensorrt-rtx --gpu sm_89
                                                                        engines for a GPU that need not be here
  python -m export my-model -o my.bundle --backend openvino --size 512x512 768x512 --batch 1 4
                                                                        build engines for these sizes too
  python -m export sd-controlnet-canny --into sd15.bundle --as canny    add a ControlNet to a bundle
  python -m export --into sd15.bundle --detach canny                    and remove it
  python -m export sd-vae-ft-mse --into sd15.bundle                     replace the VAE's decoder

Everything is read from disk; nothing is downloaded. Next: python -m runtime BUNDLE "a prompt" -o picture.png
"""


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 2 for what the user can put right, 130 for Ctrl-C."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if wrong := _impossible(options):
        parser.error(wrong)
    logging.basicConfig(level=logging.ERROR if options.quiet else logging.WARNING, format="%(message)s")
    for package in ("export", "engines") if options.verbose else ():
        logging.getLogger(package).setLevel(logging.INFO)
    try:
        with interruptible():
            bundle, names = _run(options)
    except (ExportError, EngineError, OSError, ValueError) as e:
        if options.verbose:
            logging.getLogger(__name__).exception("export failed")
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
    """The bundle, and the components of it that were made."""
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Turn a Stable Diffusion 1.x, 2.x or XL checkpoint into a bundle, or add a ControlNet or a VAE.")
    parser.add_argument("checkpoint", type=Path, nargs="?", help="a diffusers folder, or a .safetensors or .ckpt file")
    to = parser.add_mutually_exclusive_group(required=True)
    to.add_argument("-o", "--output", type=Path, metavar="BUNDLE", help="directory to write")
    to.add_argument("--into", type=Path, metavar="BUNDLE",
                    help="a bundle that a ControlNet is added to, or whose VAE decoder is replaced")
    parser.add_argument("--as", dest="name", metavar="NAME",
                        help="with --into, the ControlNet's name in requests (default: that of its folder or file)")
    parser.add_argument("--encoder", action="store_true", help="with --into, replace the VAE's encoder too")
    parser.add_argument("--detach", metavar="NAME", help="with --into, remove this ControlNet from the bundle")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto",
                        help="precision of weights and arithmetic; auto: fp16 with --gpu, else fp32")
    parser.add_argument("--config", metavar="FAMILY|DIR",
                        help=f"for a single file, its architecture: {', '.join(FAMILIES)}, or a diffusers folder of "
                             "the same architecture (default: told from the weights; 2.x is taken for sd2-v)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="use this tokenizer instead of the checkpoint's")
    parser.add_argument("--force", action="store_true", help="replace BUNDLE if it exists")
    group = parser.add_argument_group("engines", "Any of these builds engines from the bundle when it is done, which "
                                      "`python -m engines build` can do later.")
    group.add_argument("--backend", choices=["auto", *engines.BACKENDS, "none"],
                       help="which engines; auto is what is preferred here (python -m engines list)")
    group.add_argument("--size", nargs="+", type=picture_size, metavar="HxW",
                       help="picture sizes (default: the model's own)")
    group.add_argument("--batch", nargs="+", type=positive, metavar="N", help="pictures at a time (default: 1)")
    add_kernel_options(group)
    parser.add_argument("--gpu", type=_gpu, metavar="ARCH", help="the GPU that will run it, such as sm_90")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    parser.add_argument("-v", "--verbose", action="store_true", help="print what is decided, and tracebacks")
    return parser


def _impossible(options: argparse.Namespace) -> str | None:
    """What is wrong with these options together, None where nothing is."""
    only = {"--as": options.name, "--encoder": options.encoder, "--detach": options.detach}
    never = {"--force": options.force, "--tokenizer": options.tokenizer, 
             "--dtype (without --backend)": options.dtype != "auto" and not options.backend}
    wrong = [name for name, given in (never if options.into else only).items() if given]
    if wrong:
        return f"{wrong[0]} goes with {'-o' if options.into else '--into'} only"
    if (options.checkpoint is None) == (options.detach is None):
        return "--detach takes no CHECKPOINT" if options.detach else "CHECKPOINT is missing"
    return None


def _gpu(text: str) -> str:
    if not re.fullmatch(r"sm_\d+", text):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a compute capability such as sm_90")
    return text


if __name__ == "__main__":
    sys.exit(main())
