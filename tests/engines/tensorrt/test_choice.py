"""Whose kernels an engine gets: the decision, and what is read from TensorRT's inspector."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from engines.tensorrt.choice import Kinds, fastest, following
from engines.tensorrt.measure import difference, layers

NONE: Kinds = frozenset()
ATTENTION, NORM = frozenset({"attention"}), frozenset({"norm"})
BOTH = ATTENTION | NORM
TIMES = {NONE: 10.0, ATTENTION: 8.0, NORM: 9.0, BOTH: 7.0}


def decide(asked: dict[str, str], times: dict[Kinds, float | None]) -> tuple[list[Kinds], Kinds]:
    """(what is built, in turn; what is kept)."""
    seconds: dict[Kinds, float | None] = {}
    while (kinds := following(asked, seconds)) is not None:
        assert kinds not in seconds
        seconds[kinds] = times[kinds]
    return list(seconds), fastest(seconds)


@pytest.mark.parametrize(("asked", "times", "built", "kept"), [
    ({"attention": "vendor", "norm": "vendor"}, TIMES, [NONE], NONE),
    ({}, TIMES, [NONE], NONE),
    ({"attention": "ours", "norm": "vendor"}, TIMES, [ATTENTION], ATTENTION),
    ({"attention": "ours", "norm": "ours"}, TIMES, [BOTH], BOTH),
    ({"attention": "auto", "norm": "vendor"}, TIMES, [NONE, ATTENTION], ATTENTION),
    ({"attention": "auto", "norm": "vendor"}, TIMES | {ATTENTION: 11.0}, [NONE, ATTENTION], NONE),
    ({"attention": "auto", "norm": "ours"}, TIMES, [NORM, BOTH], BOTH),
    ({"attention": "auto", "norm": "auto"}, TIMES, [NONE, ATTENTION, NORM, BOTH], BOTH),
    ({"attention": "auto", "norm": "auto"}, TIMES | {BOTH: 8.5}, [NONE, ATTENTION, NORM, BOTH], ATTENTION),
    ({"attention": "auto", "norm": "auto"}, TIMES | {NORM: 10.5}, [NONE, ATTENTION, NORM], ATTENTION),
    ({"attention": "auto", "norm": "auto"}, TIMES | {ATTENTION: None}, [NONE, ATTENTION, NORM], NORM),
    ({"attention": "auto", "norm": "auto"}, TIMES | {BOTH: None}, [NONE, ATTENTION, NORM, BOTH], ATTENTION),
    ({"attention": "auto", "norm": "auto"}, dict.fromkeys(TIMES, 5.0), [NONE, ATTENTION, NORM], NONE),
], ids=itertools.count())
def test_the_faster_is_kept_and_no_more_is_built_than_that_takes(
        asked: dict[str, str], times: dict[Kinds, float | None], built: list[Kinds], kept: Kinds) -> None:
    assert decide(asked, times) == (built, kept)


def test_layers_as_the_inspector_gives_them() -> None:
    text = json.dumps({"Layers": [
        {"Name": "conv_in", "LayerType": "CaskConvolution", "TacticName": "sm80_xmma_fprop", "Inputs": []},
        {"Name": "reformat", "LayerType": "Reformat", "TacticValue": "0x3e8"}, "only a name"], "Bindings": []})
    assert layers(text, {"conv_in": [0.2, 0.1, 0.3], "gone": [1.0]}) == [
        {"name": "conv_in", "kind": "CaskConvolution", "kernel": "sm80_xmma_fprop", "milliseconds": 0.2},
        {"name": "reformat", "kind": "Reformat", "kernel": "0x3e8", "milliseconds": None},
        {"name": "only a name", "kind": None, "kernel": None, "milliseconds": None}]


def test_the_difference_of_two_builds_is_that_of_the_worst_output() -> None:
    first = {"a": np.full(4, 2.0, np.float32), "b": np.ones(4, np.float32)}
    assert difference(first, first) == 0
    assert math.isclose(difference({"a": first["a"] * 1.01, "b": first["b"] * 1.5}, first), 0.5)
    assert difference({"a": first["a"] * np.nan, "b": first["b"]}, first) == math.inf
