"""The options of the command lines for whose kernels an engine computes with: `--attention`, `--norm` …"""

from __future__ import annotations

import argparse
from typing import Any

from engines.spec import KINDS, WHOSE


def add_kernel_options(parser: Any) -> None:
    """Add an option for each kind of site to a parser or a group of one; short for `--option attention=ours` …"""
    for kind in KINDS:
        parser.add_argument(f"--{kind.replace('_', '-')}", choices=WHOSE,
                            help=f"whose {kind.replace('_', ' ')} kernels: ours, the vendor's, or auto, the faster of "
                                 "both; not every backend has every kind")


def kernel_options(options: argparse.Namespace) -> dict[str, str]:
    """Return the options of a config that were given; a backend without one of them refuses it."""
    given = vars(options)
    return {kind: given[kind] for kind in KINDS if given[kind] is not None}
