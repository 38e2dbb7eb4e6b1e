"""The engine cache: BUNDLE/engines/<component>-<backend>-<key>/ with `engine.json` and what the backend wrote."""

from __future__ import annotations

import contextlib
import datetime
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.backend import Engine, Target, backend
from engines.bundle import Bundle, hash_file, hash_files
from engines.bundle.publish import BusyError, publish
from engines.check import compare, refit
from engines.spec import EngineConfig, EngineError
from engines.store.places import engine_directories, roots, writable_root
from engines.store.plan import plan
from engines.store.record import OWN, RECORD, Record, changes, directory_name, key
from engines.store.runtime_kernels import runtime_kernels
from engines.store.words import rebuild_command, rows

logger = logging.getLogger(__name__)


def load(bundle: Bundle, component: str, config: EngineConfig) -> Engine:
    """Return the engine of one component, built first where there is none.

    What is about to be loaded is hashed; a file that is missing or differs raises EngineError naming the command that
    makes it again. So does an engine of this config that was built for another device, driver or library version,
    where there is none for this one.
    """
    path = find(bundle, component, config)
    if path is None:
        _refuse_mismatched(bundle, component, config)
        path = build(bundle, component, config)
    else:
        verify_files(bundle, path, Record.read(path, rebuild_command(bundle, component, config)))
    start = time.perf_counter()
    engine = backend(config.backend).load(Target.of(bundle, component, config), path)
    logger.info("loaded %s in %.1f s", path.name, time.perf_counter() - start)
    return engine


def build(bundle: Bundle, component: str, config: EngineConfig, *, rebuild: bool = False, check: bool = True) -> Path:
    """Build, check and publish one engine, and return its directory. One that is there is returned unless `rebuild`.

    Waits for another process that is building the same. Raises EngineError where the backend cannot build it or it is
    over tolerance; nothing is published then. One for a GPU that is not in this machine cannot be checked and says so.
    """
    if not rebuild and (there := find(bundle, component, config)):
        return there
    path = writable_root(bundle) / directory_name(bundle, component, config)
    waiting = False
    while True:
        try:
            _build(bundle, component, config, path, check)
            return path
        except BusyError:
            if not waiting:
                logger.warning("waiting for another process that is building %s", path)
            waiting = True
            time.sleep(0.2)
            if (path / RECORD).is_file():
                return path


def build_all(bundle: Bundle, name: str, *, sizes: Sequence[tuple[int, int]] = (), batches: Sequence[int] = (1,),
              dtype: str = "fp32", components: Sequence[str] = (), rebuild: bool = False, check: bool = True,
              **rest: Any) -> list[Path]:
    """Build every engine of `engines.store.plan`, whose arguments these are, and return their directories.

    For a GPU the kernels that the runtime launches itself are compiled too. rebuild, check: as of `build`.
    """
    from tqdm import tqdm

    jobs = plan(bundle, name, sizes=sizes, batches=batches, dtype=dtype, components=components, **rest)
    paths = []
    with tqdm(jobs, unit="engine", disable=None) as bar:
        for component, config in bar:
            bar.set_description(f"{component} {rows(config)}")
            paths.append(build(bundle, component, config, rebuild=rebuild, check=check))
    if jobs:
        _build_kernels(bundle, jobs[0][1])
    return paths


def find(bundle: Bundle, component: str, config: EngineConfig) -> Path | None:
    """Return the directory of a published engine with exactly this key, or None."""
    name = directory_name(bundle, component, config)
    return next((root / name for root in roots(bundle) if (root / name / RECORD).exists()), None)


def verify_files(bundle: Bundle, path: Path, record: Record) -> None:
    """Hash what loading this engine reads. Raises EngineError naming the file and the command that makes it again."""
    if backend(record.config.backend).reads_onnx(record.config):
        bundle.verify(bundle.component(record.component).files)
    for name, expected in record.files.items():
        file = path / name
        if not file.is_file() or hash_file(file) != expected:
            raise EngineError(f"{file} is {'damaged' if file.is_file() else 'missing'}; "
                              f"{rebuild_command(bundle, record.component, record.config)}")


def _build(bundle: Bundle, name: str, config: EngineConfig, path: Path, check: bool) -> None:
    from tqdm import tqdm

    module, target = backend(config.backend), Target.of(bundle, name, config)
    what = f"building {name}: {config.backend} {config.dtype} {rows(config)}"
    with publish(path, force=True) as temporary, tqdm(total=3, desc=what, delay=1, leave=False, disable=None) as bar:
        logger.info(what)
        bundle.verify(target.component.files)
        bar.update()
        start = time.perf_counter()
        module.build(target, temporary)
        seconds = time.perf_counter() - start
        bar.update()
        if missing := module.runnable(config):
            logger.warning("%s: built, not checked: %s", name, missing)
        figures, timing = compare.check(bundle, name, config, temporary) if check and not missing else (None, None)
        if figures is not None and module.refits(config):
            refit.check(bundle, name, config, temporary)
        bar.update()
        written = sorted(str(f.relative_to(temporary)) for f in temporary.rglob("*") if f.is_file())
        files = hash_files(temporary, written)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        Record(name, config, key(bundle, name, config), files, figures, round(seconds, 3), now, timing).write(temporary)


def _build_kernels(bundle: Bundle, config: EngineConfig) -> None:
    """Compile what the runtime launches beside engines of a GPU. Engines can be checked without it: failing warns."""
    arch = backend(config.backend).versions(config).get("arch", "")
    if arch.startswith("sm_"):
        try:
            runtime_kernels(bundle, arch)
        except EngineError as e:
            logger.warning("%s", e)


def _refuse_mismatched(bundle: Bundle, component: str, config: EngineConfig) -> None:
    """Raise EngineError where every engine of this config is for another device, driver or library version.

    An engine that is stale only because latentrt's sources changed is rebuilt silently.
    """
    mismatched: list[tuple[str, str]] = []
    for path in engine_directories(bundle):
        if not path.name.startswith(f"{component}-{config.backend}-"):
            continue
        with contextlib.suppress(EngineError):  # a damaged record of another key is `list`'s to show
            record = Record.read(path, "")
            if (record.component, record.config) != (component, config):
                continue
            outside = [text for name, text in changes(bundle, record).items() if not name.startswith(OWN)]
            if not outside:
                return
            mismatched.append((record.date, f"{path} was built for another machine or version ({'; '.join(outside)})"))
    if mismatched:
        raise EngineError(f"{max(mismatched)[1]}; {rebuild_command(bundle, component, config, alone=False)}")
