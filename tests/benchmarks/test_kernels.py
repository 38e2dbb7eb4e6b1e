"""`python -m benchmarks kernels`: everyone computes the same, a wrong kernel is not timed, and figures follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cases, kernels
from benchmarks.__main__ import main
from benchmarks.harness import contenders
from kernels.cpu import cpp, library
from tests.conftest import why_no_gpu

needs_cpp = pytest.mark.skipif(library.available() is not None, reason=str(library.available()))
SMALL: dict[str, Any] = {
    "attention": cases.Attention("small", 2, 3, 35, 77, 40),
    "group_norm": cases.GroupNorm("small", 2, 12, 5, 6, 1e-5, True, groups=3),
    "layer_norm": cases.LayerNorm("small", 7, 40), "geglu": cases.Geglu("small", 7, 40),
    "guidance_step": contenders.Latents("small", 2, 6, 5), "to_image": contenders.Pictures("small", 2, 8, 6),
}
CASE = "sd15-2x1280x8x8-silu"


def setting(channels_last: bool = False) -> contenders.Setting:
    isas = () if library.available() else library.isas()
    return contenders.Setting("cpu", compile=False, channels_last=channels_last, threads=1, isas=isas)


def timed(*arguments: str, status: int = 0) -> None:
    assert main(["kernels", "--no-compile", "--threads", "1", "--rounds", "3", *arguments]) == status


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels-first", "channels-last"])
@pytest.mark.parametrize("op", SMALL)
@needs_cpp
def test_everyone_computes_the_same(op: str, channels_last: bool, dtype: str) -> None:
    bench = contenders.make(op, SMALL[op], dtype, setting(channels_last))
    left_out: dict[str, str] = {}
    passed = kernels._checked(bench, left_out)
    assert left_out == {}
    assert set(passed) == {*bench.ours, *bench.peers}


@pytest.mark.parametrize("op", SMALL)
@needs_cpp
def test_a_kernel_that_is_one_percent_off_is_left_out(op: str) -> None:
    bench = contenders.make(op, SMALL[op], "fp32", setting())
    for name, ours in list(bench.ours.items()):
        bench.ours[name] = lambda *inputs, ours=ours: (ours(*inputs).double() * 1.01).to(ours(*inputs).dtype)
    left_out: dict[str, str] = {}
    assert set(kernels._checked(bench, left_out)) == set(bench.peers)
    assert set(left_out) == set(bench.ours) and all(reason.startswith("wrong: ") for reason in left_out.values())


@needs_cpp
def test_a_peer_that_computes_something_else_is_left_out() -> None:
    bench = contenders.make("geglu", SMALL["geglu"], "fp32", setting())
    bench.peers["other"] = lambda x: -bench.peers["torch"](x)
    left_out: dict[str, str] = {}
    assert "other" not in kernels._checked(bench, left_out)
    assert left_out == {"other": "wrong: differs from torch by 200.0%, expected at most 5%"}


@pytest.mark.parametrize("broken", [lambda right: right * 1.1, lambda right: 1 / 0], ids=["wrong", "raises"])
@needs_cpp
def test_a_broken_kernel_is_not_timed(broken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    right = cpp.group_norm
    monkeypatch.setattr(cpp, "group_norm", lambda *args, **options: broken(right(*args, **options)))
    file = tmp_path / "kernels.json"
    timed("--op", "group_norm", "--case", CASE, "--dtype", "fp32", "--json", str(file), status=1)
    (result,) = json.loads(file.read_text())["results"]
    assert result["seconds"] == {} and result["ours"] == {}
    assert "left out: group_norm fp32 latentrt" in capsys.readouterr().err


@needs_cpp
def test_figures_follow_from_the_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "kernels.json"
    timed("--case", CASE, "2x8x64x77", "--op", "attention", "group_norm", "geglu", "--dtype", "fp32", "--isa", "avx2",
          "--json", str(file))
    report = json.loads(file.read_text())
    assert report["machine"]["threads"] == 1 and {"cpu", "versions", "commit"} <= set(report["machine"])
    attention, norm = report["results"]
    assert attention["flops"] == 4 * 2 * 8 * 64 * 77 * 160
    assert attention["bytes"] == 4 * 2 * 8 * (64 + 77) * 160 * 2
    assert norm["bytes"] == 4 * 2 * 2 * 1280 * 64
    for result in (attention, norm):
        seconds, ours = result["seconds"], result["ours"]["latentrt-avx2"]
        median = seconds["latentrt-avx2"]["median"]
        assert all(spread["p20"] <= spread["median"] <= spread["p80"] for spread in seconds.values())
        assert ours["ratio"] == pytest.approx(seconds["torch"]["median"] / median)
        assert ours["share"] == pytest.approx(ours["limit_seconds"] / median)
        assert ours["gb_per_second"] == pytest.approx(result["bytes"] / median / 1e9)
    assert norm["ours"]["latentrt-avx2"]["limited_by"] == "copy"
    printed = capsys.readouterr().out
    assert "left out on a CPU, where we have no kernel for them: geglu\n" in printed
    assert all(f"\n{case}  latentrt-avx2" in printed for case in (attention["case"], norm["case"]))


@pytest.mark.parametrize(("arguments", "message"), [
    (("--dtype", "fp16"), "--dtype: got fp16 on cpu, expected some of bf16, fp32"),
    (("--case", "sd9"), "expected at least one shape; leave --case out"),
    (("--op", "geglu"), "got nothing to time"),
    (("--torch-isa", "avx2"), "--torch-isa: got torch loaded already"),
], ids=["dtype", "case", "op", "torch-isa"])
@needs_cpp
def test_what_cannot_be_timed_is_refused(arguments: tuple[str, ...], message: str,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    timed(*arguments, status=2)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "--device", "cuda"]) == 2
    assert "--device: got cuda, expected cpu" in capsys.readouterr().err


def test_limits_move_as_many_bytes() -> None:
    bench = contenders.make("geglu", SMALL["geglu"], "bf16", setting())
    source, out = bench.limits()["copy"].inputs
    assert source.nbytes + out.nbytes == bench.moved == 7 * 40 * 3 * 2


@pytest.mark.gpu
def test_a_gpu_times_every_op(tmp_path: Path) -> None:
    assert why_no_gpu() is None
    file = tmp_path / "kernels.json"
    smallest = ["sd15-2x8x64x64", CASE, "sd15-128x", "sd15-1x4x64x64", "sd15-1x3x512x512"]
    assert main(["kernels", "--device", "cuda", "--no-compile", "--rounds", "3", "--json", str(file),
                 "--case", *smallest]) == 0
    results = json.loads(file.read_text())["results"]
    assert [result["op"] for result in results] == list(kernels.OPS)
    assert all("latentrt" in result["ours"] and result["ours"]["latentrt"]["share"] > 0 for result in results)
