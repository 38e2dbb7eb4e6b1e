"""Hashes of files, and the check that a bundle's files are what they were."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engines.spec import EngineError

LARGE = 1 << 26
"""Bytes from which on the hash of a file is remembered while it is unchanged."""


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, as hex.

    The hash of a large file is kept, because all graphs of a network share one weights file. Hashing it takes longer
    than a tick of the clock that says when a file was changed, so a change is never missed.
    """
    about = path.stat()
    if about.st_size < LARGE:
        return _hash(path)
    return _hash_unchanged(path, about.st_ino, about.st_size, about.st_mtime_ns)


def hash_files(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """Return relative name → sha256 for files of `directory`."""
    return {name: hash_file(directory / name) for name in names}


def verify_files(directory: Path, files: Mapping[str, str], do: str) -> None:
    """Hash `files` of `directory` (relative path → sha256); do: the way out, for errors.

    Raises EngineError naming the first file that is missing or differs.
    """
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(lambda name: _hash_or_none(directory / name), files))
    for (name, expected), got in zip(files.items(), hashes, strict=True):
        if got != expected:
            state = "missing" if got is None else f"damaged (got sha256 {got[:12]}, expected {expected[:12]})"
            raise EngineError(f"{directory / name} is {state}; {do}")


@functools.lru_cache(maxsize=64)
def _hash_unchanged(path: Path, inode: int, size: int, changed: int) -> str:
    return _hash(path)


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_or_none(path: Path) -> str | None:
    return hash_file(path) if path.is_file() else None
