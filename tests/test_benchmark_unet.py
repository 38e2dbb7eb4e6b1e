"""`python -m benchmarks unet` and `pipeline`: everyone computes the same, and figures follow from the times."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import engines
from benchmarks import charts, limits, pipeline, random_model, turns, unet
from benchmarks.__main__ import main
from engines.choice import choose
from export import export
from export.single_file import CONFIGS
from tests import tiny

RMS = {"bf16": 5e-2, "fp32": 1e-4}
BF16 = choose("openvino")[1] == "bf16"
COMPILED = "diffusers-compile-bf16"
COMPILERS = (COMPILED, "latentrt-inductor-bf16")
"""Those that compile C++ for a minute or more; tests/test_inductor.py builds and runs the latter's engines."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """[bundle, checkpoint] of a tiny random Stable Diffusion 1.x whose UNet has two levels."""
    path = tmp_path_factory.mktemp("model")
    checkpoint = tiny.sd1(path / "checkpoint", levels=2)
    return [str(export(checkpoint, path / "bundle", progress=False).path), str(checkpoint)]


def here(contenders: dict[str, Any]) -> list[str]:
    """Those that take seconds, on this CPU."""
    return [name for name in contenders
            if name not in COMPILERS and (BF16 or not (name.startswith("latentrt") and name.endswith("bf16")))]


def measured(model: list[str], command: str, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    file = tmp_path / "figures.json"
    assert main([command, *model, "--size", "64x64", "--rounds", "2", "--json", str(file), *arguments]) == 0
    return json.loads(file.read_text())


def check_figures(results: dict[str, Any], limit: dict[str, Any], reference: str) -> None:
    """What both commands derive."""
    for name, result in results.items():
        median, dtype = result["median"], name[-4:]
        assert result["left_out"] is None and result["p20"] <= median <= result["p80"]
        assert result["speed"] == pytest.approx(results[reference]["median"] / median)
        assert result["share_of_floor"] == pytest.approx(limit["flops"] / limit["flop_per_second"][dtype] / median)
        assert 0.05e9 < result["peak_bytes"] < 5e9 and result["load_seconds"] > 0
        assert (result["build_seconds"] is not None) == (name.startswith("latentrt") or "compile" in name)


def test_unet_steps(model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = here(unet.CONTENDERS)
    chart = tmp_path / "unet.png"
    report = measured(model, "unet", tmp_path, "--batch", "2", "--only", *names, "--chart", str(chart))
    results = report["results"]
    assert list(results) == names and report["rows"] == 4
    assert report["limits"]["flops"] == limits.unet_flops(Path(model[1]), 4, 8, 8)
    check_figures(results, report["limits"], unet.REFERENCE)
    for name, result in results.items():
        assert result["steps_per_second"] == pytest.approx(1 / result["median"])
        assert result["rel_rms"] <= RMS[name[-4:]]
    assert all(results[name]["rel_rms"] > 0 for name in names if name != unet.REFERENCE)
    if BF16:
        rows = report["waterfall"]
        assert [row["contender"] for row in rows] == [name for _, name in unet.WATERFALL]
        assert np.prod([row["factor"] for row in rows]) == pytest.approx(rows[0]["seconds"] / rows[-1]["seconds"])
    with Image.open(chart) as image:
        assert (image.format, image.size) == ("PNG", (charts.WIDTH, charts.height(len(names))))
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in names) and "left out" not in printed


def test_pictures(model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = here(pipeline.CONTENDERS)
    options = ["--batch", "2", "--steps", "3", "--guidance", "2", "--seed", "5", "--prompt", "a cat", "--no-build"]
    file = tmp_path / "figures.json"
    assert main(["pipeline", *model, "--size", "64x64", "--rounds", "2", "--json", str(file), "--only", *names,
                 *options]) == 0
    report = json.loads(file.read_text())
    results = report["results"]
    assert list(results) == names
    checkpoint = Path(model[1])
    evaluations = 3 + 1  # PNDM's second step is taken twice
    assert report["limits"]["flops"] == (limits.text_encoder_flops(checkpoint, 2)
                                         + evaluations * limits.unet_flops(checkpoint, 4, 8, 8)
                                         + limits.vae_decoder_flops(checkpoint, 2, 8, 8))
    for name, result in results.items():
        assert result["build_seconds"] is None
        assert result["images_per_second"] == pytest.approx(2 / result["median"])
        assert set(result["stages"]) == set(pipeline.STAGES)
        assert sum(result["stages"].values()) == pytest.approx(result["median"], rel=0.5)
        assert result["max_difference"] <= (1 if name.endswith("fp32") else 64)
    assert results[pipeline.REFERENCE]["psnr"] is None
    assert "equal" in capsys.readouterr().out


@pytest.mark.slow
def test_torch_compile(model: list[str], tmp_path: Path) -> None:
    """A minute or more: it compiles, and a second start finds what the first has compiled."""
    report = measured(model, "unet", tmp_path, "--only", COMPILED)
    check_figures(report["results"], report["limits"], unet.REFERENCE)
    result = report["results"][COMPILED]
    assert 0 < result["rel_rms"] <= RMS["bf16"] and result["load_seconds"] < result["build_seconds"]
    report = measured(model, "pipeline", tmp_path, "--only", COMPILED, "--steps", "2", "--no-build")
    assert report["results"][COMPILED]["left_out"] is None


def test_psnr() -> None:
    black = np.zeros((1, 2, 2, 3), np.uint8)
    assert pipeline.difference(black + 255, black) == {"max_difference": 255, "psnr": 0.0}
    assert pipeline.difference(black, black) == {"max_difference": 0, "psnr": None}


def test_operations_of_known_functions() -> None:
    x = torch.empty(7, 3, device="meta")
    assert limits.count(torch.nn.Linear(3, 5, device="meta"), x) == 2 * 7 * 3 * 5
    conv = torch.nn.Conv2d(3, 4, 3, padding=1, device="meta")
    assert limits.count(conv, torch.empty(2, 3, 8, 9, device="meta")) == 2 * 2 * 8 * 9 * 4 * 3 * 3 * 3
    q, k = torch.empty(2, 4, 10, 16, device="meta"), torch.empty(2, 4, 12, 16, device="meta")
    assert limits.count(F.scaled_dot_product_attention, q, k, k) == 2 * 2 * 2 * 4 * 10 * 12 * 16


def test_operations_of_stable_diffusion(tmp_path: Path) -> None:
    """1.6065 TFLOP for a step with guidance and 2.5145 for a picture's decoding, at 512x512 pixels."""
    config = json.loads((CONFIGS / "sd1.json").read_text())
    for name in ("unet", "vae", "text_encoder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config[name]))
    assert limits.unet_flops(tmp_path, 2, 64, 64) == 1_606_546_882_560
    assert limits.vae_decoder_flops(tmp_path, 1, 64, 64) == 2_514_518_933_504
    assert round(limits.text_encoder_flops(tmp_path, 2) / 1e12, 4) == 0.0266


def test_a_random_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small widths, the layout that ships: made once, the same each time, and its output has the scale of noise."""
    config = json.loads((CONFIGS / "sd1.json").read_text())
    config["unet"] |= {"block_out_channels": [32, 32, 64, 64], "cross_attention_dim": 32, "layers_per_block": 1}
    config["vae"] |= {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}
    config["text_encoder"] |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                               "num_attention_heads": 2, "projection_dim": 32}
    (tmp_path / "sd1.json").write_text(json.dumps(config))
    monkeypatch.setattr("export.single_file.CONFIGS", tmp_path)
    bundle, checkpoint = random_model.make("sd1", directory=tmp_path)
    weights = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    first = weights.read_bytes()
    made = weights.stat().st_mtime_ns, (bundle / "manifest.json").stat().st_mtime_ns
    assert random_model.make("sd1", directory=tmp_path) == (bundle, checkpoint)
    assert made == (weights.stat().st_mtime_ns, (bundle / "manifest.json").stat().st_mtime_ns)
    job = unet.Job(bundle, checkpoint, 64, 64, 1, tmp_path)
    out = unet._onnxruntime(job)()
    assert 0.2 < out.std() < 5
    shutil.rmtree(checkpoint)
    random_model.make("sd1", directory=tmp_path)
    assert weights.read_bytes() == first


def test_an_engine_that_cannot_run_here_takes_part_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.backend("openvino"), "dtypes", lambda: ("fp32",))
    monkeypatch.setattr(engines.backend("onnxruntime"), "available", lambda: "it is not installed")
    default = turns.chosen(argparse.Namespace(only=None), unet.CONTENDERS, unet.REFERENCE)
    assert [name for name in default if name.startswith("latentrt")] == ["latentrt-openvino-fp32"]
    assert {"onnxruntime-fp32", "openvino-bf16", COMPILED} <= set(default)
    asked = turns.chosen(argparse.Namespace(only=["latentrt-openvino-bf16"]), unet.CONTENDERS, unet.REFERENCE)
    assert list(asked) == ["latentrt-openvino-bf16", unet.REFERENCE]


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "got no model, expected BUNDLE and CHECKPOINT, or --random {sd1,sd2-base,sd2-v}"),
    (["--random", "sdxl"], "--random: got 'sdxl', expected one of sd1, sd2-base, sd2-v"),
    (["{bundle}"], "got no model"),
    (["{bundle}", "{checkpoint}", "--random", "sd1"], "expected one; leave out the other"),
    (["{bundle}", "nowhere"], "nowhere: got no unet/config.json"),
    (["nowhere", "{checkpoint}"], "make one with: python -m export"),
    (["{bundle}", "{checkpoint}", "--size", "100x64"], "expected multiples of 16"),
    (["{bundle}", "{checkpoint}", "--chart", "bars.svg"], "--chart: got bars.svg, expected a name that ends in .png"),
], ids=["nothing", "sdxl", "no-checkpoint", "both", "checkpoint", "bundle", "size", "chart"])
@pytest.mark.parametrize("command", ["unet", "pipeline"])
def test_what_cannot_be_measured_is_refused(model: list[str], command: str, arguments: list[str], message: str,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    bundle, checkpoint = model
    assert main([command, *(a.format(bundle=bundle, checkpoint=checkpoint) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_guidance_is_needed(model: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pipeline", *model, "--guidance", "1"]) == 2
    assert "--guidance: got 1, expected a number above 1" in capsys.readouterr().err
