"""`python -m benchmarks unet` and `pipeline`: everyone computes the same, and figures follow from the times."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import engines
from benchmarks import pipeline, unet
from benchmarks.__main__ import main
from benchmarks.harness import charts, limits, turns
from benchmarks.harness.networks import component, on_cpu, on_gpu
from benchmarks.harness.turns import arguments
from engines.store.choose import choose
from tests.conftest import why_no_gpu

RMS = {"bf16": 5e-2, "fp32": 1e-4}
BF16 = choose("openvino")[1] == "bf16"
COMPILED = "diffusers-compile-bf16"
ALL = argparse.Namespace(only=None, without=[])


@pytest.fixture(scope="module")
def model(bundles: dict[str, Path], checkpoints: dict[str, Path]) -> list[str]:
    """[bundle, checkpoint] of a tiny random Stable Diffusion 1.x whose UNet has two levels."""
    return [str(bundles["sd1_two_levels"]), str(checkpoints["sd1_two_levels"])]


def here(contenders: dict[str, Any]) -> list[str]:
    """Return the names of contenders that take seconds on this CPU: not who compiles C++."""
    return [name for name in contenders
            if not ("compile" in name or "inductor" in name)
            and (BF16 or not (name.startswith("latentrt") and name.endswith("bf16")))]


def measured(model: list[str], command: str, tmp_path: Path, *arguments: str, size: str = "64x64") -> dict[str, Any]:
    file = tmp_path / "figures.json"
    assert main([command, *model, "--size", size, "--rounds", "2", "--json", str(file), *arguments]) == 0
    return json.loads(file.read_text())


def check_figures(results: dict[str, Any], limit: dict[str, Any], reference: str) -> None:
    """Check what both commands derive."""
    for name, result in results.items():
        median, dtype = result["median"], name[-4:]
        assert result["left_out"] is None and result["p20"] <= median <= result["p80"]
        assert result["speed"] == pytest.approx(results[reference]["median"] / median)
        assert result["share_of_floor"] == pytest.approx(limit["flops"] / limit["flop_per_second"][dtype] / median)
        assert 0.05e9 < result["peak_bytes"] < 5e9 and result["load_seconds"] > 0
        assert (result["build_seconds"] is not None) == (name.startswith("latentrt") or "compile" in name)


def test_unet_steps(model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = here(on_cpu.CONTENDERS)
    chart = tmp_path / "unet.png"
    report = measured(model, "unet", tmp_path, "--batch", "2", "--only", *names, "--chart", str(chart))
    results = report["results"]
    assert list(results) == names and report["rows"] == 4
    assert report["limits"]["flops"] == limits.unet_flops(Path(model[1]), 4, 8, 8)
    check_figures(results, report["limits"], on_cpu.REFERENCE)
    for name, result in results.items():
        assert result["steps_per_second"] == pytest.approx(1 / result["median"])
        assert result["image_steps_per_second"] == pytest.approx(2 / result["median"])
        assert result["rel_rms"] <= RMS[name[-4:]]
    assert all(results[name]["rel_rms"] > 0 for name in names if name != on_cpu.REFERENCE)
    if BF16:
        rows = report["waterfall"]
        assert [row["contender"] for row in rows] == [name for _, name in unet.WATERFALL]
        assert np.prod([row["factor"] for row in rows]) == pytest.approx(rows[0]["seconds"] / rows[-1]["seconds"])
    with Image.open(chart) as image:
        assert (image.format, image.size) == ("PNG", (charts.WIDTH, charts.height(len(names))))
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in names) and "left out" not in printed


def test_decoding(model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = measured(model, "vae", tmp_path, "--batch", "3", "--only", on_cpu.REFERENCE)
    assert (report["component"], report["rows"], report["waterfall"]) == ("vae_decoder", 3, [])
    assert report["limits"]["flops"] == limits.vae_decoder_flops(Path(model[1]), 3, 8, 8)
    result = report["results"][on_cpu.REFERENCE]
    assert result["images_per_second"] == pytest.approx(3 / result["median"]) and result["rel_rms"] == 0
    assert " image/s " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["unet", "vae_decoder"])
def test_everyone_computes_the_same(model: list[str], tmp_path: Path, name: str) -> None:
    workload = turns.Workload(Path(model[0]), Path(model[1]), 64, 96, 1, tmp_path, component=name)
    expected = on_cpu._diffusers("fp32", workload)()
    assert component.relative_rms(on_cpu._onnxruntime(workload)(), expected) <= RMS["fp32"]
    assert 0 < component.relative_rms(on_cpu._diffusers("bf16", workload)(), expected) <= RMS["bf16"]


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
def test_torch_compile(bundles: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path,
                       monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles, and a second start finds what the first has compiled.

    Quick, as compiling goes: a UNet and a VAE of one level, g++ without optimisation and without trying out the
    instruction sets that the CPU names, and pictures that find the kernels of the steps before.
    """
    model = [str(bundles["sd1_one_level"]), str(checkpoints["sd1_one_level"])]
    monkeypatch.setenv("TORCHINDUCTOR_DEBUG_COMPILE", "1")
    monkeypatch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "1")
    monkeypatch.setattr(arguments.tempfile, "TemporaryDirectory",
                        lambda **_: contextlib.nullcontext(tmp_path / "cache"))
    report = measured(model, "unet", tmp_path, "--only", COMPILED, size="16x16")
    check_figures(report["results"], report["limits"], on_cpu.REFERENCE)
    result = report["results"][COMPILED]
    assert 0 < result["rel_rms"] <= RMS["bf16"] and result["load_seconds"] < result["build_seconds"]
    report = measured(model, "pipeline", tmp_path, "--only", COMPILED, "--steps", "2", "--no-build", size="16x16")
    assert report["results"][COMPILED]["left_out"] is None


def test_psnr() -> None:
    black = np.zeros((1, 2, 2, 3), np.uint8)
    assert pipeline.difference(black + 255, black) == {"max_difference": 255, "psnr": 0.0}
    assert pipeline.difference(black, black) == {"max_difference": 0, "psnr": None}


def test_an_engine_that_cannot_run_here_takes_part_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.backend("openvino"), "dtypes", lambda: ("fp32",))
    monkeypatch.setattr(engines.backend("onnxruntime"), "available", lambda: "it is not installed")
    monkeypatch.setattr(engines.backend("inductor"), "dtypes", lambda: ("fp32",))
    default = turns.chosen(ALL, on_cpu.CONTENDERS, on_cpu.REFERENCE)
    assert [name for name in default if name.startswith("latentrt")] == ["latentrt-openvino-fp32"]
    assert {"onnxruntime-fp32", "openvino-bf16", COMPILED} <= set(default)
    some = argparse.Namespace(only=["latentrt-openvino-bf16", COMPILED], without=[COMPILED, on_cpu.REFERENCE])
    asked = turns.chosen(some, on_cpu.CONTENDERS, on_cpu.REFERENCE)
    assert list(asked) == ["latentrt-openvino-bf16", on_cpu.REFERENCE]


def test_on_a_gpu_everyone_computes_in_the_precision_of_the_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {name: SimpleNamespace(available=lambda: None, dtypes=lambda: ("fp16", "bf16", "fp32"),
                                   on_gpu=engines.backend(name).on_gpu) for name in on_gpu.BACKENDS}
    monkeypatch.setattr(engines, "backend", found.__getitem__)
    for dtype in ("fp16", "bf16"):
        default = turns.chosen(ALL, on_gpu.CONTENDERS, on_gpu.REFERENCE, dtype, dtype)
        ours = [f"latentrt-{backend}-{eager}{dtype}" for backend in on_gpu.BACKENDS for eager in ("", "eager-")]
        peers = [f"diffusers-{dtype}", f"diffusers-graph-{dtype}", f"onnxruntime-{dtype}"]
        assert list(default) == [on_gpu.REFERENCE, *peers, *ours, f"diffusers-compile-{dtype}"]
    graph_in_fp32 = turns.chosen(ALL, on_gpu.CONTENDERS, on_gpu.REFERENCE, "fp32", "fp16")
    assert "diffusers-fp16" in graph_in_fp32 and "onnxruntime-fp16" not in graph_in_fp32
    assert not any("tensorrt" in name for name in graph_in_fp32)  # it computes in the graph's own


def test_a_table_of_a_gpu_is_in_milliseconds(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"median": 0.005, "p20": 0.004, "p80": 0.006, "steps_per_second": 200.0, "image_steps_per_second": 400.0,
              "speed": 20.0, "share_of_floor": 0.4, "rel_rms": 1e-3, "build_seconds": None, "load_seconds": 3.0,
              "peak_bytes": 2e9, "gpu_bytes": 3e9, "left_out": None}
    rows = component.waterfall({"latentrt-inductor-fp16": result}, unet.gpu_waterfall("fp16"))
    component.show({"device": "cuda", "component": "unet", "results": {"x": result}, "waterfall": rows})
    head, line = (text.split() for text in capsys.readouterr().out.splitlines())
    assert head == ["contender", "ms", "p20", "p80", "step/s", "image-step/s", "speed", "of", "floor", "error", "first",
                    "s", "start", "s", "GB", "GPU", "GB"]
    assert line == ["x", "5.000", "4.000", "6.000", "200", "400", "20.00", "x", "40", "%", "1.0e-03", "-", "3.0", "2.0",
                    "3.0"]


@pytest.mark.gpu
@pytest.mark.parametrize("command", ["unet", "vae"])
def test_on_a_gpu(model: list[str], tmp_path: Path, command: str) -> None:
    names = ["diffusers-graph-fp16", "diffusers-fp16", on_gpu.REFERENCE]
    report = measured(model, command, tmp_path, "--device", "cuda", "--only", *names)
    for name, result in report["results"].items():
        assert result["left_out"] is None and result["rel_rms"] <= (1e-2 if name.endswith("fp16") else 0)
        assert result["gpu_bytes"] > 0
    assert report["results"]["diffusers-graph-fp16"]["median"] < report["results"]["diffusers-fp16"]["median"]
    assert set(report["limits"]["floor_seconds"]) == {"fp16", "bf16", "fp32"}


@pytest.mark.skipif(not why_no_gpu(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_made_for_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unet", "--random", "sdxl", "--device", "cuda"]) == 2
    assert "got cuda, expected cpu on a machine without an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "got no model, expected BUNDLE and CHECKPOINT, or --random {sd1,sd2-base,sd2-v"),
    (["--random", "sd3"], "--random: got 'sd3', expected one of sd1, sd2-base, sd2-v"),
    (["{bundle}"], "got no model"),
    (["{bundle}", "{checkpoint}", "--random", "sd1"], "expected one; leave out the other"),
    (["{bundle}", "nowhere"], "nowhere: got no unet/config.json"),
    (["nowhere", "{checkpoint}"], "make one with: python -m export"),
    (["{bundle}", "{checkpoint}", "--size", "100x64"], "expected multiples of 16"),
    (["{bundle}", "{checkpoint}", "--chart", "bars.svg"], "--chart: got bars.svg, expected a name that ends in .png"),
], ids=["nothing", "sd3", "no-checkpoint", "both", "checkpoint", "bundle", "size", "chart"])
@pytest.mark.parametrize("command", ["unet", "pipeline"])
def test_what_cannot_be_measured_is_refused(model: list[str], command: str, arguments: list[str], message: str,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    bundle, checkpoint = model
    assert main([command, *(a.format(bundle=bundle, checkpoint=checkpoint) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_a_contender_of_another_device_is_refused(model: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vae", *model, "--only", "diffusers-graph-fp16"]) == 2
    assert "--only: got diffusers-graph-fp16 on cpu, expected some of latentrt-" in capsys.readouterr().err


def test_guidance_is_needed(model: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pipeline", *model, "--guidance", "1"]) == 2
    assert "--guidance: got 1, expected a number above 1" in capsys.readouterr().err
