"""What is declared once of an option: its check, its JSON, its words, and the tasks that have it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.config import PipelineConfig
from runtime.request import checks
from runtime.request.control import Control
from runtime.request.lora import Lora
from runtime.request.option import changed, check_options, option, options_of, origin, stored, unset
from runtime.request.request import TASKS, Request
from runtime.tasks import TASKS as FILES


@dataclass(frozen=True)
class Toy:
    """An option of every make."""

    name: str = option(MISSING, checks.text(), "needed")
    count: int = option(1, checks.whole(1, 9), "how many", fallback=3)
    share: float | None = option(None, checks.number(0.0, 1.0), "how much", fallback=0.5)
    size: tuple[int, int] | None = option(None, checks.pair(1), "height and width", unset="its own")
    picture: Any = option(None, checks.picture(), "to look at", compare=False, store=origin)
    secret: bool = option(False, checks.boolean(), "never stored", store=None)

    def __post_init__(self) -> None:
        check_options(self, "toy ")


def test_values_are_checked_and_kept_in_one_form():
    toy = Toy("a", np.int64(2), np.float32(0.5), [3, 4])
    assert (type(toy.count), type(toy.share), toy.size) == (int, float, (3, 4))
    json.dumps(stored(toy))


@pytest.mark.parametrize(("options", "message"), [
    ({"name": None}, "toy name: got NoneType, expected a string"),
    ({"count": None}, "toy count: got None, expected a whole number from 1 to 9"),
    ({"count": True}, "toy count: got True"), ({"count": 10}, "toy count: got 10"), ({"count": 0}, "toy count: got 0"),
    ({"share": 1.01}, "toy share: got 1.01, expected a number from 0 to 1"), ({"share": float("nan")}, "got nan"),
    ({"size": (0, 1)}, "toy size: got 0, expected a whole number from 1"), ({"size": 3}, "expected two whole numbers"),
    ({"picture": 3}, "toy picture: got int, expected the path of a picture"),
    ({"secret": 1}, "toy secret: got 1, expected True or False"),
])
def test_what_cannot_be_names_the_option(options, message):
    with pytest.raises(ValueError, match=message):
        Toy(**{"name": "a", **options})


def test_what_is_given_and_what_is_stored():
    assert changed(Toy("a")) == {"name": "a"}
    toy = Toy("a", 2, size=(3, 4), picture=Path("x.png"), secret=True)
    assert changed(toy) == {"name": "a", "count": 2, "size": (3, 4), "picture": Path("x.png"), "secret": True}
    assert stored(toy) == {"name": "a", "count": 2, "size": [3, 4], "picture": "x.png"}
    assert stored(Toy("a", picture=np.zeros((2, 2)))) == {"name": "a", "picture": True}
    assert stored(Toy("a"), defaults=True)["count"] == 1 and "secret" not in stored(Toy("a"), defaults=True)


def test_what_happens_without_an_option():
    words = {name: unset(Toy, name) for name in options_of(Toy)}
    assert words == {"name": "", "count": "1", "share": "0.5", "size": "its own", "picture": "", "secret": ""}


@pytest.mark.parametrize("cls", [Request, PipelineConfig, Control, Lora])
def test_every_field_is_declared_with_words(cls):
    for name, declared in options_of(cls).items():
        assert declared.help and not declared.help.endswith("."), name
        assert declared.flag == "" or declared.flag.startswith("--"), name


def test_tasks_of_the_declarations_are_those_that_there_are():
    named = {task for one in options_of(Request).values() for task in (*(one.tasks or ()), *one.only)}
    assert named <= set(TASKS) and set(FILES) == set(TASKS)
    assert {name for name, one in options_of(Request).items() if one.needed} == {"image", "mask", "depth", "frames"}


def test_no_default_is_one_that_its_own_check_refuses():
    for cls in (Request, PipelineConfig, Control, Lora):
        for f in dataclasses.fields(cls):
            if f.default not in (MISSING, None):
                assert f.metadata["option"].check(f.name, f.default) == f.default
