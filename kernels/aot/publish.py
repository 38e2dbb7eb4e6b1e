"""Compiled kernels from the cache into the output of a build, where `Artefact.read` finds them."""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kernels.aot import cache
from kernels.aot.artefact import Artefact, KernelError
from kernels.aot.plan import Compilation

CODE_NAME = re.compile(r".+\.[0-9a-f]{12}\.(cubin|ptx)")


def publish(compilations: Iterable[Compilation], store: Path, output: Path) -> tuple[Artefact, ...]:
    """Write artefacts from the cache `store` below `output`, each with its signature last; remove what they replaced.

    Returns the artefacts; those without files do not fit their GPU and are not written. Raises KernelError where the
    cache has lost one.
    """
    made = []
    with _lock(output):
        for compilation in compilations:
            entry = cache.read(store, compilation.key)
            signature = output / f"sm_{compilation.arch}" / f"{compilation.variant.name}.json"
            signature.parent.mkdir(exist_ok=True)
            artefact = Artefact.from_json(json.loads(entry[cache.SIGNATURE]), signature)
            for kind, file in artefact.files.items():
                _write_changed(signature.parent / file, entry[kind])
            if artefact.files:
                _write_changed(signature, entry[cache.SIGNATURE])
            made.append(artefact)
        _tidy(made)
    return tuple(made)


def _tidy(made: Sequence[Artefact]) -> None:
    """Remove artefacts of the same ops and architectures that are no longer made, and code that none refers to."""
    ours = {(a.directory, a.name) for a in made if a.files}
    ops = {a.op for a in made}
    for directory in {a.directory for a in made}:
        used = set()
        for file in directory.glob("*.json"):
            try:
                artefact = Artefact.read(directory.parent, file.stem, directory.name)
            except KernelError:
                continue
            if artefact.op in ops and (directory, artefact.name) not in ours:
                file.unlink()
            else:
                used |= set(artefact.files.values())
        for file in directory.iterdir():
            if CODE_NAME.fullmatch(file.name) and file.name not in used:
                file.unlink()


def _write_changed(path: Path, data: bytes) -> None:
    if not path.is_file() or path.read_bytes() != data:
        cache.replace(path, data)


@contextmanager
def _lock(output: Path) -> Iterator[None]:
    """One writer of `output` at a time; the others wait. The system gives it back when a writer is killed."""
    output.mkdir(parents=True, exist_ok=True)
    with open(output / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
