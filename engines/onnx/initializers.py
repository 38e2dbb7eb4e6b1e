"""Initializers of an ONNX file without the onnx package, which the runtime does not import.

An ONNX file is one protobuf message (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto). Three of its messages
are walked here: ModelProto.graph (7), GraphProto.initializer (5) and, in a TensorProto, dims (1), data_type (2),
float_data (4), int32_data (5), int64_data (7), name (8), raw_data (9), external_data (13) and data_location (14).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.onnx.low_rank import Weight
from engines.spec import EngineError
from kernels.cpu.bfloat16 import rounded

FLOAT, FLOAT16, BFLOAT16 = 1, 10, 16
_GRAPH, _INITIALIZER, _DIMS, _TYPE, _NAME, _LOCATION = 7, 5, 1, 2, 8, 14
_FLOATS, _INT32S, _INT64S, _RAW, _EXTERNAL = 4, 5, 7, 9, 13
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

_NUMPY = {1: "f4", 2: "u1", 3: "i1", 5: "i2", 6: "i4", 7: "i8", 9: "?", 10: "f2", 11: "f8", 16: "u2"}
"""ONNX element type → numpy's; bfloat16, which numpy lacks, as its bits."""


@dataclass(frozen=True)
class Initializer:
    """An initializer is one stored weight: ONNX element type, shape, and whether its values are in another file."""

    type: int
    shape: tuple[int, ...]
    external: bool

    def convert(self, name: str, value: Weight) -> np.ndarray:
        """Return `value` as this weight stores it; bfloat16 as uint16, rounded to nearest even.

        Raises EngineError for another shape, or a value that is not floating point where the weight is.
        """
        value = self.check(name, value)
        if self.type == BFLOAT16:
            return rounded(np.asarray(value, np.float32))
        return np.ascontiguousarray(value, np.float16 if self.type == FLOAT16 else np.float32)

    def check(self, name: str, value: Weight) -> Weight:
        """Return `value`. Raises EngineError for another shape, or where it or the weight is not of floating point."""
        if tuple(value.shape) != self.shape:
            raise EngineError(f"weight {name}: got shape {tuple(value.shape)}, expected {self.shape}")
        if self.type not in (FLOAT, FLOAT16, BFLOAT16) or value.dtype.kind != "f":
            raise EngineError(f"weight {name}: got {value.dtype} for ONNX element type {self.type}, "
                              "expected floating-point values for a floating-point weight")
        return value


def initializers(model: bytes) -> dict[str, Initializer]:
    """Return the weights of a serialised ONNX model by name. Raises EngineError if it is not one."""
    try:
        return dict(_describe(tensor) for graph in _messages(memoryview(model), _GRAPH)
                    for tensor in _messages(graph, _INITIALIZER))
    except (IndexError, ValueError) as e:
        raise EngineError(f"not an ONNX model ({e}); export the bundle again") from e


def values(model: Path) -> dict[str, np.ndarray]:
    """Return every initializer of ONNX file `model`, read-only; bfloat16 as uint16. Other files are mapped, not read.

    Raises EngineError for an element type or a file that cannot be read.
    """
    maps: dict[str, np.memmap[Any, Any]] = {}
    arrays = {}
    try:
        for graph in _messages(memoryview(model.read_bytes()), _GRAPH):
            for tensor in _messages(graph, _INITIALIZER):
                name, weight = _describe(tensor)
                arrays[name] = _values(model, tensor, weight, maps)
    except (IndexError, KeyError, ValueError, OSError) as e:
        raise EngineError(f"{model}: its weights cannot be read ({e!r}); export the bundle again") from e
    return arrays


def _values(model: Path, tensor: memoryview, weight: Initializer, maps: dict[str, np.memmap[Any, Any]]) -> np.ndarray:
    dtype, size = np.dtype(_NUMPY[weight.type]), math.prod(weight.shape)
    fields = {number: value for number, _, value in _fields(tensor)}
    if weight.external:
        entries = dict(_entry(value) for value in _messages(tensor, _EXTERNAL))
        file = entries["location"]
        if file not in maps:
            maps[file] = np.memmap(model.parent / file, np.uint8, "r")
        start = int(entries.get("offset", 0))
        array = maps[file][start:start + size * dtype.itemsize].view(dtype)
    elif _RAW in fields or not size:
        array = np.frombuffer(fields.get(_RAW, b""), dtype)
    elif _FLOATS in fields:
        array = np.frombuffer(fields[_FLOATS], np.float32).astype(dtype)
    else:  # halves are kept as their bits
        numbers = np.array(_varints(fields[_INT64S if _INT64S in fields else _INT32S]), np.uint64)
        bits = numbers.astype(f"u{dtype.itemsize}")
        array = bits.astype(dtype) if dtype.kind == "b" else bits.view(dtype)
    return array.reshape(weight.shape)


def _entry(message: memoryview) -> tuple[str, str]:
    fields = {number: str(value, "utf8") for number, _, value in _fields(message)}
    return fields[1], fields[2]


def refitted(model: Path, names: Collection[str]) -> dict[str, Initializer]:
    """Return the initializers `names` of ONNX file `model`. Raises EngineError for one that it does not have."""
    known = initializers(model.read_bytes())
    if unknown := sorted(set(names) - set(known)):
        raise EngineError(f"refit: got unknown weights {', '.join(unknown[:3])}, expected initializers of {model}")
    return {name: known[name] for name in names}


def convert(model: Path, weights: Mapping[str, Weight]) -> dict[str, np.ndarray]:
    """Return new weights as ONNX file `model` stores them. Raises EngineError for a wrong name or shape."""
    return {name: weight.convert(name, weights[name]) for name, weight in refitted(model, weights).items()}


def externalise(model: bytes, names: Collection[str]) -> bytes:
    """Return the model with the values of weights `names` declared external, for a session that is given them."""
    parts = []
    for number, field, value in _fields(memoryview(model)):
        parts.append(_message(_GRAPH, _without_values(value, names)) if number == _GRAPH else bytes(field))
    return b"".join(parts)


def _without_values(graph: memoryview, names: Collection[str]) -> bytes:
    parts = []
    for number, field, value in _fields(graph):
        if number == _INITIALIZER and (described := _describe(value))[0] in names:
            name, weight = described
            location = _message(13, _message(1, b"location") + _message(2, b"given-to-the-session"))
            parts.append(_message(_INITIALIZER, b"".join(
                [*(b"\x08" + _varint(d) for d in weight.shape), b"\x10" + _varint(weight.type),
                 _message(_NAME, name.encode()), location, b"\x70\x01"])))
        else:
            parts.append(bytes(field))
    return b"".join(parts)


def _describe(tensor: memoryview) -> tuple[str, Initializer]:
    shape: list[int] = []
    name, kind, external = "", 0, False
    for number, field, value in _fields(tensor):
        if number == _DIMS:
            shape += _varints(value) if field[0] & 7 == _BYTES else [_number(value)]
        elif number == _TYPE:
            kind = _number(value)
        elif number == _NAME:
            name = str(value, "utf8")
        elif number == _LOCATION:
            external = _number(value) == 1
    return name, Initializer(kind, tuple(shape), external)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """Yield the number, the whole field and its value for each field of a message."""
    at = 0
    while at < len(message):
        start = at
        tag, at = _read(message, at)
        if tag & 7 == _BYTES:
            length, at = _read(message, at)
            end = at + length
        elif tag & 7 == _VARINT:
            end = _read(message, at)[1]
        elif tag & 7 in (_FIXED64, _FIXED32):
            end = at + (8 if tag & 7 == _FIXED64 else 4)
        else:
            raise ValueError(f"wire type {tag & 7} at byte {start}")
        if end > len(message):
            raise ValueError(f"it ends inside a field of {end - start} bytes")
        yield tag >> 3, message[start:end], message[at:end]
        at = end


def _messages(message: memoryview, number: int) -> Iterator[memoryview]:
    return (value for field, _, value in _fields(message) if field == number)


def _read(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _number(value: memoryview) -> int:
    return _read(value, 0)[0]


def _varints(values: memoryview) -> list[int]:
    numbers, at = [], 0
    while at < len(values):
        number, at = _read(values, at)
        numbers.append(number)
    return numbers


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _message(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(value)) + value
