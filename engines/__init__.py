"""Engines: the backends that compile one component of a bundle for static shapes, and their cache.

One file a backend; only that file imports the vendor's package, and only when the backend is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.bundle import Bundle
from engines.spec import Engine, EngineConfig, EngineError, TensorSpec

BACKENDS = {"onnxruntime": "engines.onnxruntime", "openvino": "engines.openvino",
            "inductor": "engines.inductor", "tensorrt": "engines.tensorrt:ENTERPRISE",
            "tensorrt-rtx": "engines.tensorrt:RTX"}

TIME_ROWS = 32
"""Timesteps that an engine of unet_time takes at once."""

__all__ = ["BACKENDS", "TIME_ROWS", "Bundle", "Engine", "EngineConfig", "EngineError", "TensorSpec", "backend", "build",
           "build_all", "in_parts", "load"]


def backend(name: str) -> Any:
    """A backend: its module, or the object of it after the colon. See `engines.store` for what it holds.

    Raises EngineError for an unknown name.
    """
    if name not in BACKENDS:
        raise EngineError(f"backend: got {name!r}, expected one of {', '.join(BACKENDS)}")
    module, _, attribute = BACKENDS[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def in_parts(bundle: Bundle, name: str, component: str = "unet") -> bool:
    """Whether the runtime runs a component of a bundle in the parts of `export.hoist` with this backend, or whole."""
    return backend(name).IN_PARTS and f"{component}_body" in bundle.manifest.components


def load(bundle: Bundle, component: str, config: EngineConfig) -> Engine:
    """Open the engine of one component, building it where there is none. See `engines.store.load`."""
    from engines import store

    return store.load(bundle, component, config)


def build(bundle: Bundle, component: str, config: EngineConfig, *, rebuild: bool = False, check: bool = True) -> Path:
    """Build and publish one engine, or return the one that is there. See `engines.store.build`."""
    from engines import store

    return store.build(bundle, component, config, rebuild=rebuild, check=check)


def build_all(bundle: Bundle, backend: str, *, sizes: Sequence[tuple[int, int]] = (), batches: Sequence[int] = (1,),
              dtype: str = "fp32", components: Sequence[str] = (), rebuild: bool = False, check: bool = True,
              **rest: Any) -> list[Path]:
    """Build every engine that the runtime uses for these picture sizes and batches. See `engines.store.build_all`."""
    from engines import store

    return store.build_all(bundle, backend, sizes=sizes, batches=batches, dtype=dtype, components=components,
                           rebuild=rebuild, check=check, **rest)
