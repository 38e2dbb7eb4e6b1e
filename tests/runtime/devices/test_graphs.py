"""When work is enqueued, captured and replayed; on a stream that notes what is asked of it. The rest needs a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engines import EngineError
from runtime.devices.cuda import Array
from runtime.devices.device import signature
from runtime.devices.graphs import Graphs


class Stream:
    """Stands for one of cuda.core: what runs at once and what runs from a graph is noted in `log`."""

    def __init__(self, uncapturable: bool = False) -> None:
        self.log: list[str] = []
        self.capturing = False
        self.uncapturable = uncapturable

    def create_graph_builder(self) -> Builder:
        return Builder(self)


class Builder:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def begin_building(self, mode: str) -> Builder:
        assert not self.stream.capturing
        self.stream.capturing = True
        return self

    def end_building(self) -> Builder:
        assert self.stream.capturing
        self.stream.capturing = False
        if self.stream.uncapturable:
            raise RuntimeError("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
        return self

    def complete(self) -> Builder:
        return self

    def close(self) -> None:
        self.stream.capturing = False  # as cuda.core's does

    def launch(self, stream: Stream) -> None:
        stream.log.append("launch")


def work(name: str) -> Callable[[Any], None]:
    return lambda stream: stream.log.append(f"capture {name}" if stream.capturing else name)


def test_work_runs_once_then_is_captured_then_only_launched() -> None:
    stream = Stream()
    graphs = Graphs(stream)
    for _ in range(4):
        graphs.run("a", work("a"))
    assert stream.log == ["a", "capture a", "launch", "launch", "launch"]


def test_other_keys_are_other_graphs_and_clearing_captures_anew() -> None:
    stream = Stream()
    graphs = Graphs(stream)
    for key in "aabba":
        graphs.run(key, work(key))
    assert stream.log == ["a", "capture a", "launch", "b", "capture b", "launch", "launch"]
    graphs.clear()
    stream.log.clear()
    graphs.run("a", work("a"))
    graphs.run("a", work("a"))
    assert stream.log == ["a", "capture a", "launch"]


def test_eager_never_captures() -> None:
    stream = Stream()
    graphs = Graphs(stream, eager=True)
    for _ in range(3):
        graphs.run("a", work("a"))
    assert stream.log == ["a", "a", "a"]


def test_the_graph_that_was_not_used_for_longest_goes() -> None:
    stream = Stream()
    graphs = Graphs(stream, limit=2)
    for key in "aabbabcc":
        graphs.run(key, work(key))
    stream.log.clear()
    graphs.run("b", work("b"))
    graphs.run("a", work("a"))
    assert stream.log == ["launch", "a"]


def test_a_failure_while_capturing_leaves_the_stream_usable() -> None:
    stream = Stream()
    graphs = Graphs(stream)
    graphs.run("a", work("a"))

    def fail(stream: Stream) -> None:
        raise EngineError("enqueue: mine")

    with pytest.raises(EngineError, match="mine"):
        graphs.run("a", fail)
    assert not stream.capturing
    graphs.run("a", work("a"))
    assert stream.log[-2:] == ["capture a", "launch"]


def test_what_cannot_be_captured_says_what_to_do() -> None:
    stream = Stream(uncapturable=True)
    graphs = Graphs(stream)
    graphs.run("a", work("a"))
    with pytest.raises(EngineError, match=r"cannot be captured .*INVALIDATED.* use eager=True"):
        graphs.run("a", work("a"))


def test_keys_tell_names_shapes_dtypes_and_addresses_apart() -> None:
    block = np.zeros(8, np.float32)
    same = [signature({"x": block[:4], "y": block[4:]}), signature({"y": block[4:], "x": block[:4]})]
    others = [signature(arrays) for arrays in (
        {"z": block[:4], "y": block[4:]}, {"x": block[:4].reshape(2, 2), "y": block[4:]},
        {"x": block[:4].view(np.int32), "y": block[4:]}, {"x": block[1:5], "y": block[4:]})]
    assert same[0] == same[1]
    assert len({same[0], *others}) == 5
    block += 1
    assert signature({"x": block[:4], "y": block[4:]}) == same[0], "a key must not depend on values"


def test_arrays_of_a_gpu_are_cut_and_viewed_as_numpy_does_it() -> None:
    """Addresses, shapes and dtypes by the same expressions on both."""
    numpy = np.zeros((6, 4, 16), np.float32)
    array = Array(None, numpy.ctypes.data, numpy.shape, numpy.dtype)
    for cut in (lambda a: a, lambda a: a[2], lambda a: a[-1][1:3], lambda a: a[1:4][2], lambda a: a[5:9],
                lambda a: a[3].reshape((64,)), lambda a: a[:2].view(np.uint8), lambda a: a[1][2].view(np.int64)[:3],
                lambda a: a.reshape((384,))[7:12].view(np.uint8)[:9].view(np.uint8).reshape((3, 3))):
        ours, theirs = cut(array), cut(numpy)
        assert (ours.shape, ours.dtype, ours.nbytes) == (theirs.shape, theirs.dtype, theirs.nbytes)
        assert int(ours) == theirs.ctypes.data
        assert ours.__cuda_array_interface__["data"][0] == theirs.ctypes.data
        assert ours.__cuda_array_interface__["shape"] == theirs.shape
    for wrong in (lambda a: a[6], lambda a: a[::2], lambda a: a[0][7]):
        with pytest.raises(IndexError, match="expected"):
            wrong(array)
    with pytest.raises(ValueError, match="expected 384 numbers"):
        array.reshape((3, 3))
    with pytest.raises(ValueError, match="rows of 12 bytes, expected a multiple of 8"):
        array.reshape((128, 3)).view(np.int64)
