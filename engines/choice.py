"""Which backend `auto` means on this machine, and in which precision."""

from __future__ import annotations

import logging

import engines
from engines.spec import DTYPES, EngineError

PREFERENCE = ("openvino", "onnxruntime")  # fastest first, as `python -m benchmarks unet` measures them
log = logging.getLogger(__name__)


def choose(backend: str = "auto", dtype: str = "auto") -> tuple[str, str]:
    """(backend, dtype) with "auto" filled in: the fastest backend installed, and the precision it runs best here.

    Raises EngineError for names that are not known, and where no backend can be used.
    """
    if backend == "auto":
        missing = {name: engines.backend(name).available() for name in PREFERENCE}
        backend = next((name for name, reason in missing.items() if reason is None), "")
        if not backend:
            raise EngineError("no engine is installed: " + "; ".join(str(reason) for reason in missing.values()))
    elif reason := engines.backend(backend).available():
        raise EngineError(reason)
    if dtype == "auto":
        dtype = engines.backend(backend).dtypes()[0]
    if dtype not in DTYPES:
        raise EngineError(f"dtype: got {dtype!r}, expected auto or one of {', '.join(DTYPES)}")
    log.info("backend %s, computing in %s", backend, dtype)
    return backend, dtype
