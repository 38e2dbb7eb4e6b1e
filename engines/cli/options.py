"""Types of options that several command lines have."""

from __future__ import annotations

import argparse
import re


def picture_size(text: str) -> tuple[int, int]:
    """Return (height, width) in pixels of HxW. Raises ArgumentTypeError."""
    if not (match := re.fullmatch(r"(\d+)x(\d+)", text.lower())):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected HEIGHTxWIDTH in pixels, such as 512x768")
    return int(match[1]), int(match[2])


def setting(text: str) -> tuple[str, str]:
    """Return (name, value) of NAME=VALUE. Raises ArgumentTypeError."""
    name, separator, value = text.partition("=")
    if not (name and separator):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=VALUE")
    return name, value


def positive(text: str) -> int:
    """Return a whole number of at least 1. Raises ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return int(text)
