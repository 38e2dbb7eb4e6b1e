"""The places of a bundle's engines: in it, or in the user's cache where the bundle is read-only."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from engines.bundle.bundle import Bundle
from engines.bundle.files import hash_file
from engines.bundle.manifest import MANIFEST

KERNELS = "kernels-"
"""Beginning of the name of the directory with the runtime's own kernels, which is no engine."""

logger = logging.getLogger(__name__)


def user_cache() -> Path:
    """Return where this user's caches are: $XDG_CACHE_HOME/latentrt, or ~/.cache/latentrt. It may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentrt"


def roots(bundle: Bundle) -> tuple[Path, Path]:
    """Return where engines of a bundle may be: in it, or in the user's cache when the bundle is read-only."""
    return bundle.path / "engines", user_cache() / hash_file(bundle.path / MANIFEST)[:12]


def writable_root(bundle: Bundle) -> Path:
    """Return the one of `roots` that new engines go to."""
    inside, cache = roots(bundle)
    if os.access(inside if inside.exists() else bundle.path, os.W_OK | os.X_OK):
        return inside
    logger.warning("%s is read-only; its engines go to %s", bundle.path, cache)
    return cache


def engine_directories(bundle: Bundle) -> Iterator[Path]:
    """Yield the directory of every published engine of a bundle."""
    for root in roots(bundle):
        if root.is_dir():
            yield from sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", KERNELS)))
