"""Writing directories that appear whole or not at all: one writer, a temporary name, one rename."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from engines.spec import EngineError


class BusyError(EngineError):
    """The directory is being written by another process."""


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the one writer's lock of `path` (a file `.NAME.lock` beside it). Raises BusyError if another has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.parent / f".{path.name}.lock"
    busy = BusyError(f"{path} is being written by another process; wait for it to end")
    with open(name, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not name.exists() or os.fstat(file.fileno()).st_ino != name.stat().st_ino:
                raise busy  # the holder removed this file between our open and our lock
        except BlockingIOError as e:
            raise busy from e
        try:
            yield
        finally:
            name.unlink(missing_ok=True)


@contextlib.contextmanager
def publish(path: Path, force: bool = False, marker: str | None = None) -> Iterator[Path]:
    """Yield an empty temporary directory that becomes `path` when the block ends without an exception.

    On any exception (Ctrl-C and a full disk included) the temporary directory goes and what was at `path` stays.
    What a killed writer left behind is removed. Raises BusyError where another process is writing `path`, EngineError
    where it exists and `force` is false, or where it does not hold a file `marker`: only what this program made is
    ever replaced.
    """
    path = Path(os.path.abspath(path))
    with lock(path):
        _clear_leftovers(path)
        if path.exists() and not force:
            raise EngineError(f"{path} exists; choose another place or pass --force to replace it")
        if path.exists() and marker and not (path / marker).is_file():
            raise EngineError(f"{path} holds no {marker}: this program did not write it and will not replace it; "
                              "choose another place, or remove it yourself")
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        os.chmod(temporary, 0o755)
        try:
            yield temporary
            _swap(temporary, path)
        except OSError as e:
            raise EngineError(f"could not write {path}: {e}; what was there before is unchanged") from e
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _clear_leftovers(path: Path) -> None:
    """Remove what a killed writer of `path` left; put its predecessor back if it was killed between the two renames."""
    name = glob.escape(path.name)
    for old in path.parent.glob(f".{name}.*.old"):
        if path.exists():
            _remove(old)
        else:
            os.rename(old, path)
    for temporary in path.parent.glob(f".{name}.*.tmp"):
        shutil.rmtree(temporary, ignore_errors=True)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def _swap(new: Path, path: Path) -> None:
    """Put `new` at `path`; a directory already there is removed after the rename, and put back if the rename fails."""
    if not path.exists():
        os.rename(new, path)
        return
    old = new.with_suffix(".old")
    os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)
        raise
    _remove(old)
