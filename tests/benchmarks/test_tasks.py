"""`python -m benchmarks tasks`: every task is in it, and what it says follows from what an engine draws."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks import tasks
from benchmarks.__main__ import main
from benchmarks.harness.task_cases import CASES, Model, models
from engines.spec import EngineError
from export.families.manifest import TASKS as OF_CHANNELS
from runtime.request.request import TASKS

BY_NAME = {case.name: case for case in CASES}
OPENVINO = tasks.COLUMNS["openvino-fp32"]


@pytest.fixture
def model(controlled: Path, checkpoints, tmp_path: Path) -> Model:
    """A model that was made by the session already."""
    shutil.copytree(controlled, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines"))
    shutil.copytree(checkpoints["sd1"], tmp_path / "checkpoint")
    return Model("sd1", tmp_path)


def test_every_task_and_model_is_there(tmp_path):
    own = {"inpainting": "inpaint", "inpainting_2": "inpaint", "depth": "depth-to-image", "upscaler": "upscale"}
    asked = set()
    for case in CASES:
        given = case.given(Model(case.model, tmp_path)) if case.encodes else {}
        start = "image-to-image" if "image" in given else "video" if "frames" in given else "text-to-image"
        asked.add(given.get("task") or own.get(case.model) or ("inpaint" if "mask" in given else start))
        assert case.encodes == ("image" in given or "frames" in given)
    assert asked == set(TASKS) and set(own.values()) == set(OF_CHANNELS.values())
    assert set(models(tmp_path)) == {case.model for case in CASES} and not list(tmp_path.iterdir())


def test_a_figure_is_that_of_the_latents(model):
    case = BY_NAME["image-to-image"]
    request = dataclasses.replace(case.request(model), steps=2)
    none, truth = tasks._measured(case, model, request, tasks.COLUMNS[tasks.REFERENCE], None, {})
    assert none == {"error": None}
    fine, _ = tasks._measured(case, model, request, OPENVINO, truth, {})
    off, _ = tasks._measured(case, model, request, OPENVINO, truth * np.float32(1.01), {})
    assert fine["error"] is None and 0 < fine["rel_rms"] < 2e-4
    assert off["rel_rms"] == pytest.approx(0.01 / 1.01, rel=1e-2) and "expected at most 2e-04" in off["error"]


def test_what_fails_is_said(model, monkeypatch):
    def refuse(*arguments, **options):
        raise EngineError("got no\n  luck")

    monkeypatch.setattr(tasks.Pipeline, "load", refuse)
    monkeypatch.setattr(tasks.store, "build", refuse)
    case, built = BY_NAME["text-to-image"], {}
    found, _ = tasks._measured(case, model, case.request(model), OPENVINO, None, built)
    assert found == {"error": "EngineError: got no luck"}
    gpu = tasks._built(case, model, tasks.COLUMNS["tensorrt-rtx-sm_89"], built)
    assert gpu["built"] == [] and set(built) == {("sd1", name) for name in (
        "text_encoder", "unet_text", "unet_time", "unet_body", "vae_decoder")}
    report = {"reference": tasks.REFERENCE, "missing": {"inductor-fp32": "why"}, "tasks": {"a": {"engines": {
        tasks.REFERENCE: {"error": None}, "openvino-fp32": {"error": None, "rel_rms": 1.234e-5},
        "openvino-bf16": found, "tensorrt-rtx-sm_89": {"error": None, "built": ["unet"]}}}, "b": {"engines": {
            "tensorrt-rtx-sm_89": {"error": None, "needs": "the GPU"}}}}}
    assert tasks.markdown(report, list(tasks.COLUMNS)).splitlines()[2:] == [
        "| a | reference | 1.2e-05 | failed | missing |  | built |", "| b |  |  |  | missing |  | needs a GPU |"]


def test_engines_of_a_task(model):
    """A net only where one is used, and the encoder only where there is a picture."""
    plain, encodes, control, video = (
        set(tasks._components(BY_NAME[name], model, OPENVINO))
        for name in ("text-to-image", "image-to-image", "a ControlNet", "video, with a ControlNet"))
    assert encodes - plain == {"vae_encoder"} and control - plain == {"unet_control_body"}
    assert video - encodes == {"unet_frames_body"}


def test_help_and_list_need_no_model(capsys):
    assert main(["tasks", "--list"]) == 0
    assert capsys.readouterr().out.split("\n")[:-1] == [case.name for case in CASES]
