"""Builds in processes of their own: a crash is an error, Ctrl-C takes effect at once, a kill leaves nothing."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from engines import store
from engines.spec import EngineError
from tests.cases.tensorrt import config, needs_rtx

ROOT = Path(__file__).parents[3]

pytestmark = needs_rtx


def test_a_crash_of_the_library_is_an_error(bundle):
    """One tensor as query, key and value ends TensorRT-RTX 1.7.1 with a segmentation fault."""
    with pytest.raises(EngineError, match=r"could not build .*text_encoder.onnx: the process died \(SIGSEGV\)"):
        store.build(bundle, "text_encoder", config(bundle, "text_encoder"))
    assert os.listdir(bundle.path / "engines") == []


def command(bundle, **popen):
    """`python -m engines build` of the UNet, and the process that builds in it."""
    words = [sys.executable, "-m", "engines", "build", str(bundle.path), "--backend", "tensorrt-rtx",
             "--device", "sm_89", "--component", "unet"]
    process = subprocess.Popen(words, cwd=ROOT, **popen)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_for(lambda: list((bundle.path / "engines").glob(".unet-*.tmp")) and children.read_text())
    return process, int(children.read_text().split()[0])


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def gone(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    return True


def test_ctrl_c_shows_how_far_it_was_and_stops_at_once(sd1):
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    process, builder = command(sd1, stderr=terminal)
    os.close(terminal)
    shown = b""
    while b"Determining refit engines" not in shown:  # for most of the time nobody is asked whether to go on
        shown += os.read(screen, 4096)
    assert b"%|" in shown
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    assert process.wait(timeout=20) == 130
    assert time.monotonic() - start < 1.5
    wait_for(lambda: gone(builder))
    os.close(screen)
    assert os.listdir(sd1.path / "engines") == []


def test_a_killed_build_leaves_no_engine_and_no_builder(sd1):
    process, builder = command(sd1)
    process.kill()
    process.wait()
    wait_for(lambda: gone(builder), seconds=1.5)
    assert list(store.engine_directories(sd1)) == []
    path = store.build(sd1, "unet", config(sd1, batch=1))
    assert os.listdir(sd1.path / "engines") == [path.name]
