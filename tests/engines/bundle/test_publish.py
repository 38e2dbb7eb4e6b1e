"""Directories that appear whole or not at all."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from engines.bundle.publish import BusyError, publish
from engines.spec import EngineError

ROOT = Path(__file__).parents[3]


def hold(path: Path, then: str = "") -> subprocess.Popen[str]:
    """A process inside `publish(path)`: it has written half of its files, says so, and waits to be told to go on."""
    code = textwrap.dedent(f"""
        import os, sys
        from pathlib import Path
        from engines.bundle.publish import publish
        with publish(Path({str(path)!r}), force=True) as directory:
            (directory / "a").write_text("half")
            print("in", flush=True)
            sys.stdin.readline()
            {then}
    """)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True)
    assert process.stdout and process.stdout.readline() == "in\n"
    return process


def write(path: Path, text: str, force: bool = False) -> None:
    with publish(path, force) as directory:
        (directory / "a").write_text(text)


def test_appears_whole_and_alone(tmp_path):
    with publish(tmp_path / "out") as directory:
        (directory / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "1"
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_needs_force_to_replace(tmp_path):
    write(tmp_path / "out", "old")
    with pytest.raises(EngineError, match=r"exists; .*--force"):
        write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "a").read_text() == "old"
    write(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "a").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_what_this_program_did_not_write_is_not_replaced(tmp_path, kind):
    """--force with a wrong path must not cost a user his folder."""
    path = tmp_path / "photos"
    holder = path if kind == "file" else path / "holiday.jpg"
    holder.parent.mkdir(exist_ok=True)
    holder.write_text("mine")
    refused = pytest.raises(EngineError, match=r"holds no manifest\.json")
    with refused, publish(path, force=True, marker="manifest.json"):
        pytest.fail("the block ran")
    assert holder.read_text() == "mine"
    if kind == "directory":
        (path / "manifest.json").write_text("{}")
        with publish(path, force=True, marker="manifest.json"):
            pass
        assert not holder.exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_keeps_what_was_there(tmp_path, error):
    write(tmp_path / "out", "old")
    with pytest.raises(error), publish(tmp_path / "out", force=True) as directory:
        (directory / "a").write_text("half")
        raise error
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_a_full_disk_is_an_engine_error(tmp_path):
    with pytest.raises(EngineError, match=r"could not write .*No space left"), publish(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_a_second_writer_is_refused_until_the_first_ends(tmp_path):
    first = hold(tmp_path / "out")
    with pytest.raises(BusyError, match="written by another process"):
        write(tmp_path / "out", "second", force=True)
    first.communicate("go on\n", timeout=30)
    assert (tmp_path / "out" / "a").read_text() == "half"
    write(tmp_path / "out", "second", force=True)
    assert (tmp_path / "out" / "a").read_text() == "second"


def test_a_killed_writer_leaves_nothing_visible_and_the_next_cleans_up(tmp_path):
    first = hold(tmp_path / "out")
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=30)
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out.*.tmp"))
    write(tmp_path / "out", "second")
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "second"


def test_a_writer_killed_between_the_renames_loses_nothing(tmp_path):
    write(tmp_path / "out", "old")
    os.rename(tmp_path / "out", tmp_path / ".out.abc.old")
    with pytest.raises(EngineError, match="exists"):
        write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_leftovers_of_another_name_stay(tmp_path):
    (tmp_path / ".outer.x.tmp").mkdir()
    write(tmp_path / "out", "1")
    assert sorted(os.listdir(tmp_path)) == [".outer.x.tmp", "out"]
