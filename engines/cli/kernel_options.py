"""Whose kernels an engine computes with, on the command lines: `--attention` and `--norm`."""

from __future__ import annotations

import argparse
from typing import Any

KINDS = ("attention", "norm")


def add_kernel_options(parser: Any) -> None:
    """`--attention` and `--norm` for a parser or a group of one, short for `--option attention=…` and `norm=…`."""
    for kind in KINDS:
        parser.add_argument(f"--{kind}", metavar="WHOSE", help=f"whose {kind} kernels: openvino has latentrt and "
                            "openvino, tensorrt has native, plugin (ours) and auto, which times both")


def kernel_options(options: argparse.Namespace) -> dict[str, str]:
    """The options of a config that they are; a backend without such an option refuses it."""
    return {kind: value for kind in KINDS if (value := getattr(options, kind)) is not None}
