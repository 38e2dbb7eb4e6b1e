"""Failures of an export."""

from __future__ import annotations


class ExportError(RuntimeError):
    """A checkpoint that cannot be read, is not supported, or whose graph is not what PyTorch computes."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
