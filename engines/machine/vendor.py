"""Errors of vendors' packages as EngineError: of their import, and of calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from engines.spec import EngineError


@contextlib.contextmanager
def importing(backend: str, pip: str) -> Iterator[None]:
    """Turn a failing import of a vendor's package in this block into EngineError; pip: the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as e:
        raise EngineError(f"backend {backend}: the package is missing; run: {pip}") from e
    except (ImportError, OSError) as e:
        raise EngineError(f"backend {backend}: the package does not load: {e}; install it again: {pip}") from e


@contextlib.contextmanager
def errors(could_not: str) -> Iterator[None]:
    """Turn whatever a vendor's package raises in this block into EngineError.

    could_not: the failure in words, such as "openvino could not bind".
    """
    try:
        yield
    except EngineError:
        raise
    except Exception as e:
        raise EngineError(f"{could_not}: {str(e) or type(e).__name__}") from e
