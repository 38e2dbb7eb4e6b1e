"""Engines: the backends that compile one component of a bundle for static shapes, and their cache.

One file a backend; only that file imports the vendor's package, and only when the backend is used.
"""

from __future__ import annotations

import importlib
from typing import Any

from engines.bundle import Bundle
from engines.spec import Engine, EngineConfig, EngineError, TensorSpec

BACKENDS = {"onnxruntime": "engines.onnxruntime.backend", "openvino": "engines.openvino.backend",
            "inductor": "engines.inductor.backend", "tensorrt": "engines.tensorrt.backend:ENTERPRISE",
            "tensorrt-rtx": "engines.tensorrt.backend:RTX"}

TIME_ROWS = 32
"""Timesteps that an engine of unet_time takes at once."""

__all__ = ["BACKENDS", "TIME_ROWS", "Bundle", "Engine", "EngineConfig", "EngineError", "TensorSpec", "backend"]


def backend(name: str) -> Any:
    """A backend: its module, or the object of it after the colon. See `engines.store.store` for what it holds.

    Raises EngineError for an unknown name.
    """
    if name not in BACKENDS:
        raise EngineError(f"backend: got {name!r}, expected one of {', '.join(BACKENDS)}")
    module, _, attribute = BACKENDS[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found
