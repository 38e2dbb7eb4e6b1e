"""The words that every stage shares: tensor specs, engine configs and the error of engines."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import numpy as np

DTYPES = ("fp32", "fp16", "bf16")
"""Precisions that graphs have and engines compute in."""

KINDS = ("attention", "norm", "layer_norm", "geglu")
"""Kinds of sites in a graph where a kernel can be chosen; "norm" is group normalisation."""

WHOSE = ("ours", "vendor", "auto")
"""Whose kernel a site gets: this project's, the library's of the backend, or the faster of both."""

T = TypeVar("T")


class EngineError(RuntimeError):
    """A bundle or an engine that cannot be read, built, trusted or run. The message says got / expected / do."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor spec is one input or output of a component.

    dtype: numpy's name of it. shape: numbers and names of dimensions, which an `EngineConfig` gives sizes. group: the
    set of tensors that this one belongs to, such as "residual"; "" for none. span: (low, high) that checks draw its
    values from; without one they draw standard normal numbers, or whole ones below 256.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    group: str = ""
    span: tuple[float, float] | None = None

    def resolve(self, dims: Mapping[str, int]) -> TensorSpec:
        """Return the same spec with every dimension a number. Raises EngineError for a name that `dims` lacks."""
        try:
            shape = tuple(d if isinstance(d, int) else dims[d] for d in self.shape)
        except KeyError as e:
            raise EngineError(f"tensor {self.name}: got dimension {e}, expected one of {sorted(dims)}") from e
        return dataclasses.replace(self, shape=shape)

    def empty(self) -> np.ndarray:
        """Return an uninitialised array of a resolved spec."""
        return np.empty(tuple(int(d) for d in self.shape), self.dtype)


@dataclass(frozen=True)
class EngineConfig:
    """Everything that an engine is built for; passed whole, hashed whole into the cache key.

    backend: a name of `engines.BACKENDS`. dims: the size of every dimension that the component's specs name ("height"
    and "width" in pixels, "latent_height", "sequence" …), "batch" among them; `Bundle.config` fills it in.
    dtype: the precision that the engine computes in (its inputs and outputs are float32 whatever this says). device:
    "cpu", "cpu:avx2", "cuda:0", "sm_90" … as the backend understands it. threads: 0 leaves their number to the backend.
    options: settings of the backend, JSON values only.
    """

    backend: str
    dims: Mapping[str, int] = field(default_factory=dict)
    dtype: str = "fp32"
    device: str = "cpu"
    threads: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise EngineError(f"dtype: got {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if not isinstance(self.dims, Mapping):
            raise EngineError(f"engine config dims: got {self.dims!r}, expected sizes by the name of the dimension")
        for name, value, least in (("threads", self.threads, 0), *((n, v, 1) for n, v in self.dims.items())):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise EngineError(f"engine config {name}: got {value!r}, expected a whole number of at least {least}")

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name."""
        return {**dataclasses.asdict(self), "dims": dict(self.dims), "options": dict(self.options)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the config that `to_json` wrote. Unknown keys raise EngineError."""
        return parse(cls, data, "engine config", "rebuild the engine with this version")


def parse(cls: type[T], data: Any, where: str, do: str) -> T:
    """Build dataclass `cls`, and the dataclasses in its fields, from what JSON gives of `dataclasses.asdict`.

    where: of what file, for errors; do: the way out. Raises EngineError for an unknown or a missing key, and for an
    object or a list in the place of something else.
    """
    if not isinstance(data, Mapping):
        raise EngineError(f"{where}: got {type(data).__name__}, expected an object; {do}")
    readers, required = _fields(cls)  # type: ignore[arg-type]  # a class is as hashable as any
    if unknown := data.keys() - readers.keys():
        raise EngineError(f"{where}: got unknown keys {sorted(unknown)}; {do}")
    if missing := required - data.keys():
        raise EngineError(f"{where}: missing keys {sorted(missing)}; {do}")
    return cls(**{name: readers[name](value, where, name, do) for name, value in data.items()})


Reader = Callable[[Any, str, str, str], Any]
"""What JSON says of a field, where, the field's name, the way out → the field's value."""


@functools.cache
def _fields(cls: Any) -> tuple[dict[str, Reader], frozenset[str]]:
    """Return name → reader for the fields of a dataclass, and the names of those without a default."""
    kinds = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)
    required = frozenset(f.name for f in fields
                         if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING)
    return {f.name: _reader(kinds[f.name]) for f in fields}, required


def _reader(kind: Any) -> Reader:
    """Return the reader of fields of a type: a dataclass, tuple or Mapping of these, or a single value."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        least = [one for one in inner if one is not types.NoneType]
        read = _reader(least[0])
        return lambda value, where, name, do: None if value is None else read(value, where, name, do)
    if dataclasses.is_dataclass(kind):
        return lambda value, where, name, do: parse(kind, value, f"{where}: {name}", do)  # type: ignore[arg-type]
    if origin is tuple:
        read = _reader(inner[0])
        return lambda value, where, name, do: tuple(
            read(item, where, f"{name}.{n}", do) for n, item in enumerate(_expect(list, value, where, name, do)))
    if origin is Mapping:
        read = _reader(inner[1])
        return lambda value, where, name, do: {
            key: read(item, where, f"{name}.{key}", do)
            for key, item in _expect(dict, value, where, name, do).items()}
    return _any if kind is Any else _single


def _expect(kind: type, value: Any, where: str, name: str, do: str) -> Any:
    if not isinstance(value, kind):
        expected = "a list" if kind is list else "an object"
        raise EngineError(f"{where}: {name}: got {type(value).__name__}, expected {expected}; {do}")
    return value


def _any(value: Any, where: str, name: str, do: str) -> Any:
    return value


def _single(value: Any, where: str, name: str, do: str) -> Any:
    if isinstance(value, dict | list):
        raise EngineError(f"{where}: {name}: got {type(value).__name__}, expected a single value; {do}")
    return value
