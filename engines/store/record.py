"""The key of an engine, all that it depends on, and the record of it: `engine.json` in its directory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.backend import BACKENDS, backend
from engines.bundle import Bundle, Check
from engines.check.compare import Timing
from engines.spec import EngineConfig, EngineError, parse
from engines.store.sources import hashes

FORMAT = 3
"""Version of the record. 1 had no timing, 2 a field of the config for each dimension."""
RECORD = "engine.json"
OWN = ("component.", "source.", "versions.kernels")
"""Parts of a key that are the bundle's or this project's own; all others are the machine and the vendor's library."""


@dataclass(frozen=True)
class Record:
    """The contents of `engine.json`. key: all that the engine depends on, whose sha256 names the directory.

    files: what the backend wrote → sha256. check: figures against the reference, None where the build skipped it.
    timing: what a call takes, measured together with the check; None where that was skipped.
    """

    component: str
    config: EngineConfig
    key: Mapping[str, Any]
    files: Mapping[str, str]
    check: Check | None
    build_seconds: float
    date: str
    timing: Timing | None = None
    format: int = FORMAT

    @classmethod
    def read(cls, path: Path, do: str) -> Record:
        """Read engine directory `path`. Raises EngineError ending in `do` where it is damaged or of another format."""
        file = path / RECORD
        try:
            data = json.loads(file.read_text(encoding="utf8"))
            if data["format"] != FORMAT:
                raise EngineError(f"{file}: got engine format {data['format']}, expected {FORMAT}; {do}")
            return parse(cls, data, str(file), do)
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise EngineError(f"{file}: not a readable engine record ({e!r}); {do}") from e

    def write(self, directory: Path) -> None:
        """Write `directory`/engine.json."""
        text = json.dumps({**dataclasses.asdict(self), "config": self.config.to_json()}, indent=1)
        (directory / RECORD).write_text(text + "\n", encoding="utf8")


def key(bundle: Bundle, component: str, config: EngineConfig) -> dict[str, Any]:
    """Return all that an engine depends on: ONNX files, whole config, versions and device, and our own sources."""
    module, spec = backend(config.backend), bundle.component(component)
    package = BACKENDS[config.backend].partition(":")[0].rpartition(".")[0]
    material = {"component": {"name": component, "file": spec.file, "files": spec.files, "dtype": spec.dtype,
                              "inputs": [dataclasses.asdict(s) for s in spec.inputs],
                              "outputs": [dataclasses.asdict(s) for s in spec.outputs]},
                "config": config.to_json(), "versions": module.versions(config),
                "source": dict(hashes(package))}
    try:
        return json.loads(_canonical(material))
    except TypeError as e:
        raise EngineError(f"engine config options: got {config.options!r}, expected JSON values only") from e


def directory_name(bundle: Bundle, component: str, config: EngineConfig) -> str:
    """Return the name of the engine's directory, COMPONENT-BACKEND-KEY."""
    digest = hashlib.sha256(_canonical(key(bundle, component, config)).encode()).hexdigest()
    return f"{component}-{config.backend}-{digest[:12]}"


def backend_of(path: Path) -> str:
    """Return the backend of an engine by the name of its directory, where its record may be damaged."""
    name = path.name.rpartition("-")[0]
    return max((known for known in BACKENDS if name.endswith(f"-{known}")), key=len, default="BACKEND")


def stale(bundle: Bundle, record: Record) -> str | None:
    """Return why the engine would not be used today ("versions.openvino: 1 → 2"), or None where it would."""
    return "; ".join(changes(bundle, record).values()) or None


def changes(bundle: Bundle, record: Record) -> dict[str, str]:
    """Return the parts of the key that are not today's: name → "name: then → now"."""
    if record.component not in bundle.manifest.components:
        return {"component.name": f"component.name: {record.component} → none"}
    then = dict(_flat(record.key))
    now = dict(_flat(key(bundle, record.component, record.config)))
    return {name: f"{name}: {then.get(name)} → {now.get(name)}" for name in sorted({*then, *now})
            if then.get(name) != now.get(name)}


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key_, inner in value.items():
            yield from _flat(inner, f"{name}.{key_}" if name else key_)
    else:
        yield name, _canonical(value)
