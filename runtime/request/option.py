"""Options that are declared once: fields of a dataclass that know how they are checked, explained and stored.

    @dataclass(frozen=True)
    class Request:
        steps: int = option(50, whole(1, 10_000), "solver steps", flag="--steps")

        def __post_init__(self) -> None:
            check_options(self)

The command line (`runtime.cli.options`), what is stored in a picture, the refusals of `runtime.request.task` and the
table of docs/tasks.md (`runtime.request.table`) follow from these declarations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

from runtime.request.checks import Check

REFUSAL = "{name}: got {value}, which {task} with this {family} model does not have; leave it out"


def plain(value: Any) -> Any:
    """Return a value as JSON holds it: tuples become lists."""
    return list(value) if isinstance(value, tuple) else value


def origin(value: Any) -> Any:
    """Return the file that a picture comes from; True for a picture given by hand, which is not stored."""
    return str(value) if isinstance(value, (str, Path)) else True


def members(value: Any) -> Any:
    """Return the JSON of every member."""
    return [member.to_json() for member in value]


@dataclass(frozen=True)
class Option:
    """The declaration of an option, beside its name, type and default.

    check: what its values may be. help: one line, for the command line and the documentation. flag: its name on the
    command line, "" where it has none; metavar: the word that follows the flag, "" for the one that `check` has;
    repeats: the flag may be given again; group: heading that the flag is under. unset: what happens where it is None,
    in words; fallback: the value that stands for None, where there is one.
    tasks: those that have it, None for all of them; needed: these tasks cannot do without it. only: task → the values
    that it may have there. condition: the field of a condition of the manifest which it fills; models without that
    field do not have the option. refusal: the error where task or model does not have it.
    store: the value to what JSON holds, None for an option that is never stored.
    """

    check: Check
    help: str
    flag: str = ""
    metavar: str = ""
    repeats: bool = False
    group: str = ""
    unset: str = ""
    fallback: Any = None
    tasks: tuple[str, ...] | None = None
    needed: bool = False
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    condition: str = ""
    refusal: str = REFUSAL
    store: Callable[[Any], Any] | None = plain

    def fits(self, task: str, value: Any) -> bool:
        """Return whether `task` has the option, with that value."""
        return (self.tasks is None or task in self.tasks) and (task not in self.only or value in self.only[task])


def option(default: Any, check: Check, help: str, *, compare: bool = True, repr: bool = True, **declared: Any) -> Any:
    """Declare a field of a dataclass with its `Option`; default: dataclasses.MISSING where there is none."""
    return field(default=default, compare=compare, repr=repr, metadata={"option": Option(check, help, **declared)})


def options_of(cls: Any) -> dict[str, Option]:
    """Return the options of a dataclass or an instance by name, in the order of its fields."""
    return {f.name: f.metadata["option"] for f in dataclasses.fields(cls)}


def defaults_of(cls: Any) -> dict[str, Any]:
    """Return the defaults of a dataclass or an instance by name, of the fields that have one."""
    return {f.name: f.default for f in dataclasses.fields(cls) if f.default is not MISSING}


def unset(cls: Any, name: str) -> str:
    """Return in words what happens where an option is not given; "" where that goes without saying."""
    declared, default = options_of(cls)[name], defaults_of(cls).get(name)
    value = declared.fallback if default is None else default
    if declared.unset or value is None or isinstance(value, bool) or value == ():
        return declared.unset
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def check_options(instance: Any, prefix: str = "") -> None:
    """Check and normalise every field of a frozen dataclass; None passes where it is the default.

    prefix: what errors put before the name of an option. Raises ValueError.
    """
    for name, declared, value, default in _fields(instance):
        if value is not None or default is not None:
            object.__setattr__(instance, name, declared.check(prefix + name, value))


def changed(instance: Any) -> dict[str, Any]:
    """Return the values, by name, of the options that have another value than their default."""
    return {name: value for name, _, value, default in _fields(instance) if _differs(value, default)}


def stored(instance: Any, defaults: bool = False) -> dict[str, Any]:
    """Return the JSON, by name, of the options that are stored and changed; defaults: of those unchanged, too."""
    return {name: declared.store(value) for name, declared, value, default in _fields(instance)
            if declared.store and (defaults or _differs(value, default))}


def _fields(instance: Any) -> Iterator[tuple[str, Option, Any, Any]]:
    """Yield name, option, value and default of every field."""
    for f in dataclasses.fields(instance):
        yield f.name, f.metadata["option"], getattr(instance, f.name), f.default


def _differs(value: Any, default: Any) -> bool:
    return value is not None if default is None else default is MISSING or value != default
