"""The words that every stage shares: tensor specs, engine configs and the error of engines."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
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
    """One input or output of a component.

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
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := set(data) - set(fields):
        raise EngineError(f"{where}: got unknown keys {sorted(unknown)}; {do}")
    required = {name for name, f in fields.items()
                if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    if missing := required - set(data):
        raise EngineError(f"{where}: missing keys {sorted(missing)}; {do}")
    kinds = _kinds(cls)  # type: ignore[arg-type]  # a class is as hashable as any
    return cls(**{name: _value(kinds[name], value, f"{where}: {name}", do) for name, value in data.items()})


@functools.cache
def _kinds(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _value(kind: Any, value: Any, where: str, do: str) -> Any:
    """Return what JSON says of a field of type `kind` as that type; numbers and strings are taken as they are."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(one for one in kind.__args__ if one is not type(None))
    inner = typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return parse(kind, value, where, do)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise EngineError(f"{where}: got {type(value).__name__}, expected a list; {do}")
        return tuple(_value(inner[0], one, f"{where}.{n}", do) for n, one in enumerate(value))
    if typing.get_origin(kind) is Mapping:
        if not isinstance(value, Mapping):
            raise EngineError(f"{where}: got {type(value).__name__}, expected an object; {do}")
        return {name: _value(inner[1], one, f"{where}.{name}", do) for name, one in value.items()}
    if isinstance(value, Mapping | list) and kind is not Any:
        raise EngineError(f"{where}: got {type(value).__name__}, expected a single value; {do}")
    return value
