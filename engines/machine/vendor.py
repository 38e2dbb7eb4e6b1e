"""What goes wrong in a vendor's package, as EngineError: its import, and what it raises."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from engines.spec import EngineError


@contextlib.contextmanager
def importing(backend: str, pip: str) -> Iterator[None]:
    """Around the import of a backend's package, which the command `pip` installs."""
    try:
        yield
    except ModuleNotFoundError as e:
        raise EngineError(f"backend {backend}: the package is missing; run: {pip}") from e
    except (ImportError, OSError) as e:
        raise EngineError(f"backend {backend}: the package does not load: {e}; install it again: {pip}") from e


@contextlib.contextmanager
def errors(could_not: str) -> Iterator[None]:
    """Around calls of it, which may raise anything; could_not: in words, such as "openvino could not bind"."""
    try:
        yield
    except EngineError:
        raise
    except Exception as e:
        raise EngineError(f"{could_not}: {str(e) or type(e).__name__}") from e
