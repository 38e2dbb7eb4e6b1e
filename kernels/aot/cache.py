"""Compiled kernels on disk: a directory with one zip file a key, of the signature and the code.

    DIR/ab/abcd….zip        signature.json  cubin  ptx        the code is left out where it does not fit the GPU
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from kernels.aot.artefact import Artefact, KernelError

SIGNATURE = "signature.json"


def default() -> Path:
    """Return the directory that is used where none is asked for."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentrt" / "kernels"


def pack(artefact: Artefact, code: Mapping[str, bytes]) -> bytes:
    """Return an entry as `write` takes it. code: "cubin" and "ptx" → bytes, or nothing."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(SIGNATURE, json.dumps(artefact.to_json(), indent=1) + "\n")
        for kind, data in code.items():
            archive.writestr(kind, data)
    return file.getvalue()


def write(directory: Path, key: str, entry: bytes) -> None:
    """Put an entry into the cache."""
    path = path_of(directory, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, entry)


def find(directory: Path, key: str) -> Mapping[str, bytes] | None:
    """Return the files of an entry, each with its checksum verified, or None where there is none or it is damaged."""
    try:
        with zipfile.ZipFile(path_of(directory, key)) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def read(directory: Path, key: str) -> Mapping[str, bytes]:
    """Return the files of an entry that was written before. Raises KernelError where it is gone."""
    entry = find(directory, key)
    if entry is None:
        raise KernelError(f"{path_of(directory, key)} vanished while building; build again")
    return entry


def path_of(directory: Path, key: str) -> Path:
    """Return the file of an entry."""
    return directory / key[:2] / f"{key}.zip"


def replace(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, then rename, so that readers and other writers see all of it or nothing."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
