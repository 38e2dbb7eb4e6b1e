"""Ctrl-C on the command lines, which stays Ctrl-C whatever library it hits."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn an exception that comes after Ctrl-C in this block into KeyboardInterrupt.

    Libraries that catch everything turn the interrupt into an error of their own (safetensors makes it "could not read
    the file", an extension module that is being loaded an ImportError), and the user would be told of a broken file.
    """
    if (threading.current_thread() is not threading.main_thread()
            or signal.getsignal(signal.SIGINT) is not signal.default_int_handler):
        yield  # somebody else's to handle, or ignored as in a background job
        return
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as e:
        if interrupted:
            raise KeyboardInterrupt from e
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
