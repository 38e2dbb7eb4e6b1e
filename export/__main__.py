"""`python -m export CHECKPOINT -o BUNDLE`: the command line of `export.export`."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from pathlib import Path

import engines
from engines.bundle import Bundle
from engines.interrupt import interruptible
from engines.kernel_options import add_kernel_options, kernel_options
from engines.options import picture_size, positive
from engines.spec import DTYPES, EngineConfig, EngineError
from export import FAMILIES, ExportError, export

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

Everything is read from disk; nothing is downloaded. Next: python -m runtime BUNDLE "a prompt" -o picture.png
"""


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 2 for what the user can put right, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.ERROR if options.quiet else logging.WARNING, format="%(message)s")
    for package in ("export", "engines") if options.verbose else ():
        logging.getLogger(package).setLevel(logging.INFO)
    try:
        with interruptible():
            bundle = _run(options)
    except (ExportError, EngineError, OSError, ValueError) as e:
        if options.verbose:
            logging.getLogger(__name__).exception("export failed")
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was kept", file=sys.stderr)
        return 130
    if not options.quiet:
        print(f"{bundle.path}: {bundle.manifest.family}, {bundle.manifest.components['unet'].dtype}")
        for name, component in bundle.manifest.components.items():
            print(f"  {name:13} differs from PyTorch by {component.check.rel_rms:.1e} (relative RMS)")
    return 0


def _run(options: argparse.Namespace) -> Bundle:
    own = kernel_options(options)
    build = options.backend or ("auto" if options.size or options.batch or own else "none")
    dtype = options.dtype if options.dtype != "auto" else "fp16" if options.gpu else "fp32"
    device = "cpu"
    if build != "none":  # before the long part: a missing backend, or a GPU it has no code for, shows at once
        from engines.choice import choose

        engine, computes, device, why = choose(build, options.dtype, device=options.gpu or "auto",
                                               build=options.gpu is not None)
        graph = computes if device == "cpu" else dtype
        engines.backend(engine).versions(EngineConfig(engine, graph, device=device, options=own))
        if device != "cpu":
            computes = "auto"  # as each graph is: XL's VAE is bf16 in an fp16 bundle
        if build == "auto" and not options.quiet:
            print(f"auto: {engine} {computes} on {device}: {why}", file=sys.stderr)
    bundle = export(options.checkpoint, options.output, force=options.force, progress=not options.quiet, dtype=dtype,
                    config=options.config, tokenizer=options.tokenizer)
    if build != "none":
        engines.build_all(bundle, engine, sizes=options.size or (), batches=options.batch or (1,), dtype=computes,
                          device=device, options=own)
    return bundle


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Turn a Stable Diffusion 1.x, 2.x or XL checkpoint into a bundle.")
    parser.add_argument("checkpoint", type=Path, help="a diffusers folder, or a .safetensors or .ckpt file")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE", help="directory to write")
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


def _gpu(text: str) -> str:
    if not re.fullmatch(r"sm_\d+", text):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a compute capability such as sm_90")
    return text


if __name__ == "__main__":
    sys.exit(main())
