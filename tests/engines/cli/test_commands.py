"""`python -m engines`: what its commands say, and the status that they end with."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import engines
from engines import __main__ as cli
from engines import store
from engines.cli.kernel_options import kernel_options
from tests.engines.cases import config, without_backend

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

ROOT = Path(__file__).parents[3]


def run(capsys, *words):
    status = cli.main([str(w) for w in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_build_list_inspect_verify(bundle, capsys):
    status, out, _ = run(capsys, "build", bundle.path, "--backend", "openvino", "--size", "64x64", "64x96",
                         "--batch", 2)
    assert status == 0
    shapes = sorted(line[line.index("  "):].split("fp32")[0].strip() for line in out.splitlines()[1:])
    assert shapes == sorted(["2 rows", "2 rows 8x8 latents", "4 rows 8x8 latents", "2 rows 8x12 latents",
                             "4 rows 8x12 latents", "1 row 64x64", "1 row 64x96"])
    status, out, _ = run(capsys, "list", bundle.path, "--json")
    listed = json.loads(out)
    assert status == 0 and [b["name"] for b in listed["backends"]] == list(engines.BACKENDS)
    assert len(listed["engines"]) == 7 and {e["state"] for e in listed["engines"]} == {"ok"}
    status, out, _ = run(capsys, "inspect", bundle.path)
    assert status == 0 and "noise_pred[batch, 4, latent_height, latent_width]" in out and "1 Attention" in out
    assert f"tasks: {', '.join(bundle.manifest.tasks)}" in out
    status, out, _ = run(capsys, "verify", bundle.path)
    assert status == 0 and out.count("ok") == 8
    (bundle.path / "unet.onnx.data").write_bytes(b"damaged")
    status, out, _ = run(capsys, "verify", bundle.path)
    assert status == 1 and "damaged" in out


def test_list_shows_stale_and_damaged_engines(bundle, capsys, monkeypatch):
    path = store.build(bundle, "unet", config(bundle))
    module = engines.backend("openvino")
    with monkeypatch.context() as patch:
        patch.setattr(module, "versions", lambda c=None, real=module.versions: {**real(c), "openvino": "9"})
        assert 'stale: versions.openvino: ' in run(capsys, "list", bundle.path)[1]
        assert run(capsys, "verify", bundle.path)[0] == 0
    with without_backend("openvino"):
        assert "unusable here: backend: got 'openvino'" in run(capsys, "list", bundle.path)[1]
    (path / "engine.json").write_text("[]")
    assert "damaged: " in run(capsys, "list", bundle.path)[1]
    status, out, _ = run(capsys, "verify", bundle.path)
    assert status == 1 and "engines build" in out


@pytest.mark.parametrize(("words", "message"), [
    (["build", "BUNDLE", "--backend", "openvino", "--size", "64x60"], "got 64x60.* multiples of 8 pixels .*try 64x64"),
    (["build", "BUNDLE", "--backend", "openvino", "--component", "unett"], "got component 'unett'"),
    (["inspect", "/nowhere"], "expected a bundle"),
])
def test_errors_are_one_line_and_status_2(bundle, capsys, words, message):
    status, _, err = run(capsys, *[bundle.path if w == "BUNDLE" else w for w in words])
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(err)


def test_ctrl_c_at_the_command_line_is_130(bundle):
    code = "import sys, engines, engines.__main__ as cli; module = engines.backend('openvino')\n" \
           "def build(*a): print('in', flush=True); sys.stdin.readline()\n" \
           f"module.build = build; sys.exit(cli.main(['build', {str(bundle.path)!r}, '--backend', 'openvino']))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert os.listdir(bundle.path / "engines") == []


@pytest.mark.parametrize(("words", "message"), [
    (["build", "BUNDLE", "--option", "x"], "argument --option: got 'x', expected NAME=VALUE"),
    (["build", "BUNDLE", "--attention", "openvino"], "invalid choice: 'openvino'"),
    (["build", "BUNDLE", "--batch", "0"], "expected a whole number of at least 1"),
    (["paint"], "invalid choice: 'paint'"),
], ids=["option", "attention", "batch", "command"])
def test_wrong_words_are_status_2(capsys, words, message):
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    assert message in capsys.readouterr().err


def test_whose_kernels_is_asked_for_in_the_same_words_everywhere():
    words = ["build", "BUNDLE", "--attention", "ours", "--layer-norm", "auto", "--geglu", "vendor"]
    options = cli.parser().parse_args(words)
    assert kernel_options(options) == {"attention": "ours", "layer_norm": "auto", "geglu": "vendor"}


def test_verify_shows_figures_of_an_engine_that_fails(bundle, capsys, monkeypatch):
    path = store.build(bundle, "unet", config(bundle))
    module = engines.backend("openvino")
    old = next(numpy_helper.to_array(w) for w in onnx.load(bundle.path / "unet.onnx").graph.initializer
               if w.name == "conv_out.weight")

    def load(*given, real=module.load):
        engine = real(*given)
        engine.refit({"conv_out.weight": old * np.float32(1.01)})
        return engine

    monkeypatch.setattr(module, "load", load)
    status, out, _ = run(capsys, "verify", bundle.path, "--json")
    found = next(check for check in json.loads(out)["checks"] if check["name"] == path.name)
    assert status == 1 and "differs from onnxruntime fp32 on cpu by 1.00e-02" in found["error"]
    figures = found["outputs"]["noise_pred"]
    assert figures["rel_rms"] == pytest.approx(0.01, rel=1e-3) and figures["cosine"] == pytest.approx(1)
    assert 40 < figures["psnr"] < 60 and 0 < figures["mean_abs"] < figures["max_abs"]
