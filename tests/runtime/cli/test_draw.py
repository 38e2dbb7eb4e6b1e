"""`python -m runtime` as a user calls it."""

import functools
import importlib
import json
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from PIL import Image

import engines
from runtime.__main__ import main


@pytest.fixture
def draw(bundles, tmp_path):
    """Run the command line on the tiny SD 1 bundle; options are strings. Returns the exit status."""
    def run(*options, prompt="a cat", output="cat.png", bundle=None):
        words = [] if prompt is None else [prompt]
        return main([str(bundle or bundles["sd1"]), *words, "--backend", "onnxruntime", "--size", "64x64",
                     "--steps", "2", "--quiet", "-o", str(tmp_path / output), *options])
    return run


def test_a_picture_repeats_itself(draw, tmp_path, bundles):
    assert draw("--seed", "3", "--negative", "rain", "--scheduler", "euler") == 0
    assert main([str(bundles["sd1"]), "--from", str(tmp_path / "cat.png"), "--backend", "onnxruntime", "--quiet",
                 "-o", str(tmp_path / "again.png")]) == 0
    first, again = Image.open(tmp_path / "cat.png"), Image.open(tmp_path / "again.png")
    assert first.size == (64, 64)
    assert first.tobytes() == again.tobytes()
    assert json.loads(first.text["latentrt"])["request"] == json.loads(again.text["latentrt"])["request"]


def test_the_seed_that_was_drawn_is_in_the_picture(draw, tmp_path):
    assert draw() == 0
    request = json.loads(Image.open(tmp_path / "cat.png").text["latentrt"])["request"]
    assert 0 <= request["seed"] < 2**32 and request["prompt"] == "a cat"


def test_count_numbers_the_files_and_each_repeats_alone(draw, tmp_path, bundles):
    assert draw("--count", "2", "--seed", "5", "--grid", str(tmp_path / "grid.png")) == 0
    assert Image.open(tmp_path / "grid.png").size == (130, 64)
    assert main([str(bundles["sd1"]), "--from", str(tmp_path / "cat-1.png"), "--backend", "onnxruntime", "--quiet",
                 "-o", str(tmp_path / "again.png")]) == 0
    assert Image.open(tmp_path / "again.png").tobytes() == Image.open(tmp_path / "cat-1.png").tobytes()


def test_json_tells_files_seeds_and_seconds(draw, capsys, tmp_path):
    assert draw("--seed", "9", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["images"][0]["file"] == str(tmp_path / "cat.png")
    assert report["images"][0]["request"]["seed"] == 9
    assert {"load", "text", "denoise", "decode", "total"} == set(report["seconds"])


def test_json_tells_why_a_backend_was_chosen(draw, capsys):
    assert draw("--json") == 0
    assert "a step" in (why := json.loads(capsys.readouterr().out)["chosen"]) or why == "asked for"
    assert draw("--json", "--force", "--dtype", "auto", "-v") == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "fp32"


def test_what_follows_from_a_request_is_worked_out_once(draw, monkeypatch):
    """Task, sampler table and what `auto` means, for the bundle, the engines and the report together."""
    calls = Counter()

    def counted(name, function):
        def call(*args, **options):
            calls[name] += 1
            return function(*args, **options)
        return call

    for place, name in (("request.plan", "task_of"), ("request.plan", "table_of"), ("config", "choose")):
        module = importlib.import_module(f"runtime.{place}")
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    assert draw() == 0
    assert calls == {"task_of": 1, "table_of": 1, "choose": 1}


def test_rebuild_replaces_engines_of_another_version(draw, bundles, tmp_path, capsys, monkeypatch):
    draw = functools.partial(draw, bundle=shutil.copytree(bundles["sd1"], tmp_path / "bundle"))
    assert draw() == 0
    module = engines.backend("onnxruntime")
    monkeypatch.setattr(module, "versions", lambda c=None, real=module.versions: {**real(c), "onnxruntime": "9"})
    assert draw("--force") == 2
    error = capsys.readouterr().err
    assert 'versions.onnxruntime: "' in error and "python -m engines build" in error and "--rebuild" in error
    assert draw("--force", "--rebuild") == 0
    assert draw("--force") == 0


def test_an_existing_picture_is_kept_unless_forced(draw, tmp_path, capsys):
    (tmp_path / "cat.png").write_bytes(b"mine")
    assert draw() == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "cat.png").read_bytes() == b"mine"
    assert draw("--force") == 0
    assert Image.open(tmp_path / "cat.png").size == (64, 64)


@pytest.mark.parametrize(("options", "message"), [
    (["--scheduler", "eulr"], "eulr"), (["--steps", "0"], "steps: got 0"), (["--seed", "-1"], "seed: got -1"),
    (["--size", "65x64"], "multiples of 64"), (["--batch", "0"], "batch: got 0"), (["--backend", "cuda"], "cuda"),
    (["--dtype", "fp8"], "fp8"), (["--from", "nowhere.png"], "nowhere.png"), (["-o", "cat.txt"], "cat.txt"),
])
def test_bad_options_are_one_line(draw, capsys, options, message):
    assert draw(*options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_no_prompt_is_an_error_that_says_what_to_do(draw, capsys):
    assert draw(prompt=None) == 2
    assert "--from" in capsys.readouterr().err


def test_a_missing_bundle_names_the_export_command(tmp_path):
    run = subprocess.run([sys.executable, "-m", "runtime", str(tmp_path / "none"), "a cat"], capture_output=True,
                         text=True, check=False)
    assert run.returncode == 2
    assert "python -m export" in run.stderr and "Traceback" not in run.stderr
