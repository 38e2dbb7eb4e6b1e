"""Ctrl-C in the middle of a library that catches everything."""

import os
import signal
import threading

import pytest

from engines.interrupt import interruptible


def read_badly() -> None:
    """As safetensors does: an interrupt becomes an error about the file."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        raise OSError("the file could not be read") from None


def test_an_interrupt_that_a_library_turned_into_an_error():
    with pytest.raises(KeyboardInterrupt), interruptible():
        read_badly()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_as_it_should_be():
    with pytest.raises(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), signal.SIGINT)


def test_an_error_without_an_interrupt_is_itself():
    with pytest.raises(ZeroDivisionError), interruptible():
        print(1 / 0)
    with pytest.raises(OSError, match="read"):
        read_badly()  # outside: what this file is about


def test_others_handlers_stay():
    """A thread may not set one, and a background job ignores the signal on purpose."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    raised = []

    def work() -> None:
        try:
            with interruptible():
                pass
        except ValueError as e:
            raised.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not raised
