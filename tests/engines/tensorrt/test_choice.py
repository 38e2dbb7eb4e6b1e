"""Whose kernels an engine gets: the decision, what is read from TensorRT's inspector, and the options that ask."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from engines import __main__ as cli
from engines.spec import EngineConfig, EngineError
from engines.tensorrt.backend import ENTERPRISE, RTX
from engines.tensorrt.build import ABOUT
from engines.tensorrt.choice import Kinds, fastest, following
from engines.tensorrt.measure import difference, layers
from export.__main__ import main as export_main
from tests.tools.small import small_bundle

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
    ({"attention": "native", "norm": "native"}, TIMES, [NONE], NONE),
    ({}, TIMES, [NONE], NONE),
    ({"attention": "plugin", "norm": "native"}, TIMES, [ATTENTION], ATTENTION),
    ({"attention": "plugin", "norm": "plugin"}, TIMES, [BOTH], BOTH),
    ({"attention": "auto", "norm": "native"}, TIMES, [NONE, ATTENTION], ATTENTION),
    ({"attention": "auto", "norm": "native"}, TIMES | {ATTENTION: 11.0}, [NONE, ATTENTION], NONE),
    ({"attention": "auto", "norm": "plugin"}, TIMES, [NORM, BOTH], BOTH),
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


def test_details_are_what_the_build_wrote(tmp_path: Path) -> None:
    (tmp_path / ABOUT).write_text('{"arch": "sm_90", "kernels": {}}')
    assert ENTERPRISE.details(tmp_path) == {"arch": "sm_90", "kernels": {}}
    for wrong in ("{", "[]"):
        (tmp_path / ABOUT).write_text(wrong)
        with pytest.raises(EngineError, match=r"tensorrt.json cannot be read .*--backend tensorrt --rebuild"):
            ENTERPRISE.details(tmp_path)
    (tmp_path / ABOUT).unlink()
    with pytest.raises(EngineError, match=r"tensorrt.json cannot be read"):
        ENTERPRISE.details(tmp_path)


def asked(flavour, **options: str) -> dict[str, str]:
    return flavour._kernels_asked(EngineConfig(flavour.name, device="sm_89", options=options))


def test_auto_wherever_there_can_be_plugins() -> None:
    assert asked(ENTERPRISE) == {"attention": "auto", "norm": "auto"}
    assert asked(ENTERPRISE, attention="native") == {"attention": "native", "norm": "auto"}
    assert asked(ENTERPRISE, stripped="true") == asked(RTX) == {"attention": "native", "norm": "native"}
    assert asked(RTX, attention="native") == {"attention": "native", "norm": "native"}
    for flavour, options, message in (
            (RTX, {"attention": "plugin"}, "option attention: got 'plugin', expected native: TensorRT-RTX has no"),
            (RTX, {"norm": "auto"}, "option norm: got 'auto', expected native: TensorRT-RTX"),
            (ENTERPRISE, {"norm": "plugin", "stripped": "true"}, "option norm: got 'plugin', expected native: a str"),
            (ENTERPRISE, {"norm": "latentrt"}, "option norm: got 'latentrt', expected native, plugin or auto")):
        with pytest.raises(EngineError, match=message):
            asked(flavour, **options)


def test_the_command_lines_pass_it_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """An option that the backend does not have, or a value that it does not know, is its own error."""
    words = ["build", str(small_bundle(tmp_path / "small").path), "--component", "unet", "--backend"]
    assert cli.main([*words, "openvino", "--attention", "flash"]) == 2
    assert "option attention: got 'flash', expected one of latentrt, openvino" in capsys.readouterr().err
    assert cli.main([*words, "onnxruntime", "--norm", "native"]) == 2
    assert "onnxruntime: got unknown options ['norm']" in capsys.readouterr().err
    words = [str(tmp_path / "no checkpoint"), "-o", str(tmp_path / "bundle"), "--backend", "openvino"]
    assert export_main([*words, "--attention", "flash"]) == 2
    assert "option attention: got 'flash', expected one of latentrt, openvino" in capsys.readouterr().err
