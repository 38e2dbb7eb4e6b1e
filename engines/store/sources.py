"""Sources that shape what is built: the files of a folder or module, and every file of ours that they import."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

from engines.bundle.files import hash_file

ROOT = Path(__file__).parent.parent.parent
"""The folder that holds the packages."""
PACKAGES = ("engines", "kernels")


@functools.cache
def hashes(*names: str) -> Mapping[str, str]:
    """Return file, relative to ROOT → sha256, for all that folders and modules consist of or import, lazily too.

    names: such as "engines.openvino" and "kernels.calls". The files are read once a process.
    """
    todo = [file for name in names for file in _files(ROOT / name.replace(".", "/"))]
    found: dict[Path, None] = {}
    while todo:
        if (file := todo.pop()) not in found:
            found[file] = None
            todo += _imported(file)
    return {str(file.relative_to(ROOT)): hash_file(file) for file in sorted(found)}


def _files(place: Path) -> list[Path]:
    return sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]


def _imported(file: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.partition(".")[0] in PACKAGES:
                place = ROOT / name.replace(".", "/")
                yield from (path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file())
