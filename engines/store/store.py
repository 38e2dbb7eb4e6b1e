"""The engine cache: BUNDLE/engines/<component>-<backend>-<key>/ with `engine.json` and what the backend wrote.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import logging
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engines
from engines.backend import Engine, Target
from engines.bundle import Bundle, Check, hash_file, hash_files
from engines.bundle.publish import BusyError, publish, user_cache
from engines.check import refit as verify_refit
from engines.check import verify
from engines.check.verify import Timing
from engines.spec import EngineConfig, EngineError, parse
from engines.store import sources

FORMAT = 3  # 1 had no timing, 2 a field of the config for each dimension
RECORD = "engine.json"
KERNELS = "kernels-"
"""What the directory of the runtime's own kernels begins with (`engines/store/runtime_kernels.py`); it is no engine."""
OWN = ("component.", "source.", "versions.kernels")
"""Parts of a key that are the bundle's or this project's own; all others are the machine and the vendor's library."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """What `engine.json` says. key: all that the engine depends on, whose sha256 names the directory.

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
        text = json.dumps({**dataclasses.asdict(self), "config": self.config.to_json()}, indent=1)
        (directory / RECORD).write_text(text + "\n", encoding="utf8")


def load(bundle: Bundle, component: str, config: EngineConfig) -> Engine:
    """The engine of one component, built first where there is none.

    What is about to be loaded is hashed; a file that is missing or differs raises EngineError naming the command that
    makes it again. So does an engine of this config that was built for another device, driver or library version,
    where there is none for this one.
    """
    path = find(bundle, component, config)
    fresh = path is None
    if fresh:
        _refuse_mismatched(bundle, component, config)
    path = path or build(bundle, component, config)
    module = engines.backend(config.backend)
    if not fresh:
        verify_files(bundle, path, Record.read(path, rebuild_command(bundle, component, config)))
    start = time.perf_counter()
    engine: Engine = module.load(Target.of(bundle, component, config), path)
    log.info("loaded %s in %.1f s", path.name, time.perf_counter() - start)
    return engine


def build(bundle: Bundle, component: str, config: EngineConfig, *, rebuild: bool = False, check: bool = True) -> Path:
    """Build, check and publish one engine; returns its directory. One that is there is returned unless `rebuild`.

    Waits for another process that is building the same. Raises EngineError where the backend cannot build it or it is
    over tolerance; nothing is published then. One for a GPU that is not in this machine cannot be checked and says so.
    """
    if not rebuild and (found := find(bundle, component, config)):
        return found
    path = writable_root(bundle) / directory_name(bundle, component, config)
    waiting = False
    while True:
        try:
            _build(bundle, component, config, path, check)
            return path
        except BusyError:
            if not waiting:
                log.warning("waiting for another process that is building %s", path)
            waiting = True
            time.sleep(0.2)
            if (path / RECORD).is_file():
                return path


def build_all(bundle: Bundle, backend: str, *, sizes: Sequence[tuple[int, int]] = (), batches: Sequence[int] = (1,),
              dtype: str = "fp32", components: Sequence[str] = (), rebuild: bool = False, check: bool = True,
              tokens: int = 0, **rest: Any) -> list[Path]:
    """Build every engine that the runtime uses for pictures of `sizes` (height, width; default the bundle's own).

    Denoisers are built for `batch` rows and, negative prompts first, 2·`batch`; text encoders and VAEs do not depend
    on it. dtype "auto" is what the backend prefers on this machine, and on a GPU that of the graph. tokens: of the
    text, 0 for those of one prompt. rest: further fields of EngineConfig. Raises ValueError for a size that the model cannot draw.
    """
    from tqdm import tqdm

    jobs = plan(bundle, backend, sizes=sizes, batches=batches, dtype=dtype, components=components, tokens=tokens,
                **rest)
    paths = []
    with tqdm(jobs, unit="engine", disable=None) as bar:
        for name, config in bar:
            bar.set_description(f"{name} {rows(config)}")
            paths.append(build(bundle, name, config, rebuild=rebuild, check=check))
    if jobs:
        _build_kernels(bundle, jobs[0][1])
    return paths


def _build_kernels(bundle: Bundle, config: EngineConfig) -> None:
    """What the runtime launches beside engines of a GPU. They can be checked without it, so a failure is a warning."""
    from engines.store.runtime_kernels import runtime_kernels

    arch = engines.backend(config.backend).versions(config).get("arch", "")
    if arch.startswith("sm_"):
        try:
            runtime_kernels(bundle, arch)
        except EngineError as e:
            log.warning("%s", e)


def plan(bundle: Bundle, backend: str, *, sizes: Sequence[tuple[int, int]] = (), batches: Sequence[int] = (1,),
         dtype: str = "fp32", components: Sequence[str] = (), tokens: int = 0,
         **rest: Any) -> list[tuple[str, EngineConfig]]:
    """(component, config) of every engine that `build_all` builds, each once."""
    module = engines.backend(backend)
    jobs: list[tuple[str, EngineConfig]] = []
    for height, width in sizes or (bundle.manifest.default_size,):
        bundle.check_size(height, width)
        for name in components or used(bundle, backend):
            own = dtype if dtype != "auto" else bundle.component(name).dtype if module.on_gpu else module.dtypes()[0]
            for count in sorted({count for batch in batches for count in _row_counts(name, batch)}):
                config = bundle.config(name, backend=backend, size=(height, width), batch=count, tokens=tokens,
                                       dtype=own, **rest)
                if (name, config) not in jobs:
                    jobs.append((name, config))
    return jobs


def in_parts(bundle: Bundle, name: str, component: str = "unet") -> bool:
    """Whether the runtime runs a component of a bundle in the parts of `export.passes.hoist` with this backend, or whole."""
    return engines.backend(name).in_parts and f"{component}_body" in bundle.manifest.components


def used(bundle: Bundle, backend: str) -> list[str]:
    """The components that the runtime runs with this backend; a UNet that takes residuals only with a ControlNet, and
    never the one for videos, which is built when it is named or first used."""
    def runs(name: str) -> bool:
        whole = bundle.part_of(name)
        if (whole or name) == "unet_frames" or ((whole or name) == "unet_control" and not bundle.controls):
            return False
        return in_parts(bundle, backend, whole or name) == (whole is not None)

    return [name for name in bundle.manifest.components if runs(name)]


def find(bundle: Bundle, component: str, config: EngineConfig) -> Path | None:
    """The directory of a published engine with exactly this key, or None."""
    name = directory_name(bundle, component, config)
    return next((root / name for root in roots(bundle) if (root / name / RECORD).exists()), None)


def roots(bundle: Bundle) -> tuple[Path, Path]:
    """Where engines of a bundle may be: in it, or in the user's cache when the bundle is read-only."""
    return bundle.path / "engines", user_cache() / hash_file(bundle.path / "manifest.json")[:12]


def engine_directories(bundle: Bundle) -> Iterator[Path]:
    """Every published engine of a bundle."""
    for root in roots(bundle):
        if root.is_dir():
            yield from sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", KERNELS)))


def key(bundle: Bundle, component: str, config: EngineConfig) -> dict[str, Any]:
    """All that an engine depends on: ONNX files, whole config, versions and device, and our own source."""
    module = engines.backend(config.backend)
    spec = bundle.component(component)
    material = {"component": {"name": component, "file": spec.file, "files": spec.files, "dtype": spec.dtype,
                              "inputs": [dataclasses.asdict(s) for s in spec.inputs],
                              "outputs": [dataclasses.asdict(s) for s in spec.outputs]},
                "config": config.to_json(), "versions": module.versions(config),
                "source": dict(sources.hashes(engines.BACKENDS[config.backend].partition(":")[0].rpartition(".")[0]))}
    try:
        return json.loads(_canonical(material))
    except TypeError as e:
        raise EngineError(f"engine config options: got {config.options!r}, expected JSON values only") from e


def directory_name(bundle: Bundle, component: str, config: EngineConfig) -> str:
    digest = hashlib.sha256(_canonical(key(bundle, component, config)).encode()).hexdigest()
    return f"{component}-{config.backend}-{digest[:12]}"


def stale(bundle: Bundle, record: Record) -> str | None:
    """Why the engine would not be used today ("versions.openvino: 1 → 2"), or None where it would."""
    return "; ".join(_changes(bundle, record).values()) or None


def verify_files(bundle: Bundle, path: Path, record: Record) -> None:
    """Hash what loading this engine reads. Raises EngineError naming the file and the command that makes it again."""
    if engines.backend(record.config.backend).reads_onnx(record.config):
        bundle.verify(bundle.component(record.component).files)
    for name, expected in record.files.items():
        file = path / name
        if not file.is_file() or hash_file(file) != expected:
            raise EngineError(f"{file} is {'damaged' if file.is_file() else 'missing'}; "
                              f"{rebuild_command(bundle, record.component, record.config)}")


def rebuild_command(bundle: Bundle, component: str | None, config: EngineConfig) -> str:
    """"build it again: python -m engines build …" for one engine, or for those of every component of its size."""
    size, batch = bundle.manifest.picture_size(config.dims), config.dims["batch"]
    batch = batch // 2 if batch % 2 == 0 else batch  # building for n also builds 2n rows
    words = ["python", "-m", "engines", "build", str(bundle.path), "--backend", config.backend,
             *(["--component", component] if component else []), "--batch", str(batch), "--dtype", config.dtype]
    words += ["--size", f"{size[0]}x{size[1]}"] if size else []
    tokens = config.dims.get("sequence", bundle.tokens)
    words += ["--tokens", str(tokens)] if tokens != bundle.tokens else []
    words += ["--threads", str(config.threads)] if config.threads else []
    words += ["--device", config.device] if config.device != "cpu" else []
    words += [w for name, value in config.options.items() for w in ("--option", f"{name}={value}")]
    return f"build it again: {shlex.join([*words, '--rebuild'])}"


def rows(config: EngineConfig) -> str:
    """Shape of a config in words: "2 rows 512x512"."""
    dims = config.dims
    size = (f" {dims['height']}x{dims['width']}" if {"height", "width"} <= dims.keys() else
            f" {dims['latent_height']}x{dims['latent_width']} latents" if "latent_height" in dims else "")
    return f"{dims['batch']} row{'s' * (dims['batch'] > 1)}{size}"


def _build(bundle: Bundle, name: str, config: EngineConfig, path: Path, check: bool) -> None:
    from tqdm import tqdm

    module = engines.backend(config.backend)
    spec = bundle.component(name)
    what = f"building {name}: {config.backend} {config.dtype} {rows(config)}"
    with publish(path, force=True) as temporary, tqdm(total=3, desc=what, delay=1, leave=False, disable=None) as bar:
        log.info(what)
        bundle.verify(spec.files)
        bar.update()
        start = time.perf_counter()
        module.build(Target.of(bundle, name, config), temporary)
        seconds = time.perf_counter() - start
        bar.update()
        if missing := module.runnable(config):
            log.warning("%s: built, not checked: %s", name, missing)
        figures, timing = verify.check(bundle, name, config, temporary) if check and not missing else (None, None)
        if figures is not None and module.refits(config):
            verify_refit.check(bundle, name, config, temporary)
        bar.update()
        written = sorted(str(f.relative_to(temporary)) for f in temporary.rglob("*") if f.is_file())
        files = hash_files(temporary, written)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        Record(name, config, key(bundle, name, config), files, figures, round(seconds, 3), now, timing).write(temporary)


def _changes(bundle: Bundle, record: Record) -> dict[str, str]:
    """Parts of the key that are not today's: name → "name: then → now"."""
    if record.component not in bundle.manifest.components:
        return {"component.name": f"component.name: {record.component} → none"}
    then = dict(_flat(record.key))
    now = dict(_flat(key(bundle, record.component, record.config)))
    return {name: f"{name}: {then.get(name)} → {now.get(name)}" for name in sorted({*then, *now})
            if then.get(name) != now.get(name)}


def _refuse_mismatched(bundle: Bundle, component: str, config: EngineConfig) -> None:
    """Raise EngineError where every engine of this config is for another device, driver or library version.

    One that only our own sources have left behind is no such engine: it is built again without a word.
    """
    found: list[tuple[str, str]] = []
    for path in engine_directories(bundle):
        if not path.name.startswith(f"{component}-{config.backend}-"):
            continue
        with contextlib.suppress(EngineError):  # a damaged record of another key is `list`'s to show
            record = Record.read(path, "")
            if (record.component, record.config) != (component, config):
                continue
            outside = [text for name, text in _changes(bundle, record).items() if not name.startswith(OWN)]
            if not outside:
                return
            found.append((record.date, f"{path} was built for another machine or version ({'; '.join(outside)})"))
    if found:
        raise EngineError(f"{max(found)[1]}; {rebuild_command(bundle, None, config)}")


def writable_root(bundle: Bundle) -> Path:
    """The one of `roots` that new engines go to."""
    inside, cache = roots(bundle)
    if os.access(inside if inside.exists() else bundle.path, os.W_OK | os.X_OK):
        return inside
    log.warning("%s is read-only; its engines go to %s", bundle.path, cache)
    return cache


def _row_counts(component: str, batch: int) -> tuple[int, ...]:
    """The static batches that the runtime runs a component with, for `batch` pictures denoised together."""
    if component.startswith("text_encoder") or component.endswith("_text"):
        return (2,)  # negative prompt and prompt
    if component.endswith("_time"):
        return (engines.TIME_ROWS,)
    if component.startswith("vae") or component.endswith("_hint"):
        return (1,)  # pictures are decoded one by one: it is no slower, and memory stays that of one; so are hints
    return (batch, 2 * batch)  # without guidance, and with


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key_, inner in value.items():
            yield from _flat(inner, f"{name}.{key_}" if name else key_)
    else:
        yield name, _canonical(value)
