"""ControlNets and VAEs in a bundle that is there already.

New files come in a directory of their own, named after their content; replacing manifest.json is what makes them part
of the bundle; then what nothing refers to goes. Whenever it is interrupted, one of the two bundles is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engines
from engines.bundle import Bundle, Component, Manifest, write_manifest
from engines.bundle.publish import lock
from engines.spec import EngineError
from export.bundle import provenance
from export.errors import ExportError

_TEMPORARY = ".adding."
_OURS = re.compile(r"(control_[\w-]+|vae)-[0-9a-f]{12}|vae_(de|en)coder\.onnx(\.data)?|"
                   r"\.adding\..*|\.manifest\.json\.tmp")


def attach(source: str | Path, bundle: str | Path, name: str | None = None, *, encoder: bool = False,
           config: str | Path | None = None, progress: bool = True) -> Bundle:
    """Trace a ControlNet or VAE, compare it with PyTorch, and make it part of `bundle`; nothing else is touched.

    source: a diffusers folder of a ControlNetModel or AutoencoderKL, or such a model as one file in the original
    layout. name: of a ControlNet, which becomes the component control_NAME; the source's by default; one of the same
    name is replaced. A VAE replaces vae_decoder and, if `encoder`, vae_encoder. Its precision is the bundle's. config,
    for a single file: as of `export.export`. progress: draw a bar if stderr is a terminal.
    Raises ExportError or engines.EngineError; the bundle is then what it was.
    """
    with _writing(Path(bundle)) as (old, directory):
        from export.families.addition import open_addition
        from export.trace.component import export_components

        found = open_addition(Path(source), old, name, encoder, config)
        made = export_components(found, old.dtype, directory, progress)
        added = _place(made, directory, old.path / f"{found.key}-{_digest(made)}")
        about = {component: provenance(found) for component in found.modules}
        components = {n: c for n, c in old.manifest.components.items() if c.network != found.key}
        _commit(old, components | added, {**old.manifest.provenance.get("added", {}), **about})
    return Bundle.open(bundle)


def detach(name: str, bundle: str | Path) -> Bundle:
    """Remove ControlNet `name` and its engines from `bundle`. Raises ExportError where there is none of that name."""
    with _writing(Path(bundle)) as (old, _):
        if name not in old.labels:
            have = f"one of {', '.join(old.labels)}" if old.labels else "the name of an attached net; there is none"
            raise ExportError(f"{old.path}: got ControlNet {name!r}, expected {have}")
        gone = old.graphs(old.label(name))
        added = {n: a for n, a in old.manifest.provenance.get("added", {}).items() if n not in gone}
        _commit(old, {n: c for n, c in old.manifest.components.items() if n not in gone}, added)
        engine = re.compile(rf"({'|'.join(gone)})-({'|'.join(engines.BACKENDS)})-[0-9a-f]{{12}}")
        for path in (old.path / "engines").glob("*"):
            if engine.fullmatch(path.name):
                _remove(path)
    return Bundle.open(bundle)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[tuple[Bundle, Path]]:
    """Keep others from writing the bundle at `path` in the block; yields it, and a temporary directory in it."""
    path = Path(os.path.abspath(path))
    Bundle.open(path)  # before a lock file appears beside what is no bundle
    try:
        with lock(path):
            bundle = Bundle.open(path)
            _sweep(path, bundle.manifest)
            directory = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=path))
            os.chmod(directory, 0o755)
            try:
                yield bundle, directory
            finally:
                shutil.rmtree(directory, ignore_errors=True)
    except OSError as e:
        raise EngineError(f"could not write {path}: {e}; the bundle is what it was") from e


def _digest(components: dict[str, Component]) -> str:
    files = {file: digest for component in components.values() for file, digest in component.files.items()}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]


def _place(components: dict[str, Component], directory: Path, target: Path) -> dict[str, Component]:
    """Move `directory` to `target`; returns the components as files there.

    What is at `target` already was left by one that was killed, or is the same net: its files have the same content.
    """
    target.mkdir(exist_ok=True)
    for file in sorted(directory.iterdir()):
        os.replace(file, target / file.name)
    return {name: dataclasses.replace(
        component, file=f"{target.name}/{component.file}",
        files={f"{target.name}/{file}": digest for file, digest in component.files.items()})
        for name, component in components.items()}


def _commit(old: Bundle, components: dict[str, Component], added: dict[str, Any]) -> None:
    """Replace the manifest, by which the bundle is another, and remove what it no longer refers to."""
    about = {key: value for key, value in old.manifest.provenance.items() if key != "added"}
    new = dataclasses.replace(old.manifest, components=components,
                              provenance={**about, "added": added} if added else about)
    write_manifest(old.path, new)
    _sweep(old.path, new)


def _sweep(path: Path, manifest: Manifest) -> None:
    """Remove files that this program made in the bundle at `path` and `manifest` does not refer to."""
    used = {Path(file).parts[0] for component in manifest.components.values() for file in component.files}
    for file in list(path.iterdir()):
        if _OURS.fullmatch(file.name) and file.name not in used:
            _remove(file)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
