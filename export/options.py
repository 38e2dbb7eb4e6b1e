"""Options of `python -m export`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import engines
from engines.cli.kernel_options import add_kernel_options
from engines.cli.options import picture_size, positive
from engines.spec import DTYPES
from export.sources.architectures import ARCHITECTURES

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


def make_parser(prog: str = "python -m export") -> argparse.ArgumentParser:
    """Return the parser of the command line. prog: what it calls itself."""
    parser = argparse.ArgumentParser(
        prog=prog, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
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
    parser.add_argument("--config", metavar="NAME|DIR",
                        help=f"for a single file, its architecture: {', '.join(ARCHITECTURES)}, or a diffusers folder "
                             "of the same architecture (default: told from the weights; 2.x is taken for sd2-v)")
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


def impossible(options: argparse.Namespace) -> str | None:
    """Say what is wrong with these options together; None where nothing is."""
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
