"""Ctrl-C in the middle of a library that catches everything, in processes of their own, without other handlers."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BEGIN = """
import os, signal, threading
from engines.cli.interrupt import interruptible

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

def read_badly():  # as safetensors does: an interrupt becomes an error about the file
    try:
        interrupt()
    except KeyboardInterrupt:
        raise OSError("the file could not be read") from None

def outcome(block, work):
    try:
        with block:
            work()
        return "done"
    except BaseException as e:
        return type(e).__name__
"""


@pytest.mark.parametrize(("code", "said"), [
    ("print(outcome(interruptible(), read_badly), signal.getsignal(signal.SIGINT) is signal.default_int_handler)",
     "KeyboardInterrupt True"),
    ("print(outcome(interruptible(), interrupt))", "KeyboardInterrupt"),
    ("print(outcome(interruptible(), lambda: 1 / 0))", "ZeroDivisionError"),
    ("import contextlib\nprint(outcome(contextlib.nullcontext(), read_badly))", "OSError"),
    ("signal.signal(signal.SIGINT, signal.SIG_IGN)\nprint(outcome(interruptible(), interrupt))", "done"),
    ("t = threading.Thread(target=lambda: print(outcome(interruptible(), int)))\nt.start()\nt.join()", "done"),
], ids=["turned-into-an-error", "plain", "no-interrupt", "without-the-block", "ignored", "thread"])
def test_interruptible(code: str, said: str) -> None:
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    done = subprocess.run([sys.executable, "-c", f"{start}{BEGIN}{code}"], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    assert done.stdout.strip() == said
