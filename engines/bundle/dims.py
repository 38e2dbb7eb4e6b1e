"""The named dimensions of tensor specs, and where their sizes come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from engines.spec import EngineError


@dataclass(frozen=True)
class DimSpec:
    """The source of a dimension's size: dimension `of` divided by `divisor` and rounded up, or the number `size`."""

    of: str = ""
    divisor: int = 1
    size: int = 0

    def __post_init__(self) -> None:
        if bool(self.of) == bool(self.size) or self.divisor < 1 or self.size < 0:
            raise EngineError(f"manifest dims: got {self!r}, expected either the name of another dimension and a "
                              "divisor, or a size")


def resolve_dims(names: Iterable[str], given: Mapping[str, int], dims: Mapping[str, DimSpec]) -> dict[str, int]:
    """Return name → size for the dimensions `names`: as given, else as `dims` says.

    Raises EngineError for a dimension of which neither says a size.
    """
    def size(name: str, seen: tuple[str, ...] = ()) -> int:
        if name in given:
            return given[name]
        if name not in dims or name in seen:
            raise EngineError(f"dimension {' ← '.join((*seen, name))}: got no size, expected one of "
                              f"{', '.join({**given, **dims})}")
        spec = dims[name]
        return spec.size or -(-size(spec.of, (*seen, name)) // spec.divisor)

    return {name: size(name) for name in names}


def size_of(name: str, known: Mapping[str, int], dims: Mapping[str, DimSpec]) -> int:
    """Return the size of dimension `name` from those of `known` that follow from it; 0 where none does.

    A size that was rounded up stands for several; the finest of `known` stands for the fewest, and the largest of them
    is returned.
    """
    if name in known:
        return known[name]
    sizes = [(divisor, size * divisor) for dim, size in known.items() if (divisor := _divisor(dim, name, dims))]
    return min(sizes)[1] if sizes else 0


def _divisor(name: str, ancestor: str, dims: Mapping[str, DimSpec]) -> int:
    """Return how many of `ancestor` make one of `name`; 0 where `name` does not follow from it."""
    divisor = 1
    for _ in dims:
        if name == ancestor or name not in dims:
            break
        name, divisor = dims[name].of, divisor * dims[name].divisor
    return divisor if name == ancestor else 0
