"""Which backend and device a pipeline takes, on a machine without a GPU; with one see tests/test_device.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.__main__ import main as benchmark
from engines import EngineError
from engines.choice import choose, device_of
from runtime.__main__ import main
from tests.conftest import why_no_gpu
from tests.small import small_bundle

pytestmark = pytest.mark.skipif(why_no_gpu() is None, reason="is about a machine without an NVIDIA GPU")


def test_a_cpu_is_what_auto_means_here() -> None:
    assert choose()[0] == choose(device="cpu")[0] in ("openvino", "onnxruntime")
    assert device_of("onnxruntime") == device_of("openvino") == "cpu"
    assert device_of("onnxruntime", "cuda") == "cuda:0"
    assert device_of("onnxruntime", "cuda:1") == "cuda:1"


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(EngineError, match=r"device: got cuda:0, expected one that an installed backend runs on"):
        choose(device="cuda:0")
    with pytest.raises(EngineError, match=r"device: got none that tensorrt-rtx runs on, expected an NVIDIA GPU"):
        device_of("tensorrt-rtx")


@pytest.mark.parametrize(("words", "message"), [
    (["--device", "cuda:0"], "device: got cuda:0, expected one that"),
    (["--backend", "tensorrt-rtx"], "got none that tensorrt-rtx runs on")])
def test_the_command_line_says_so(words: list[str], message: str, tmp_path: Path,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    bundle = small_bundle(tmp_path / "small")
    assert main([str(bundle.path), "a cat", "--quiet", *words]) == 2
    assert message in capsys.readouterr().err


def test_graphs_are_not_measured_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark(["graphs", "no.bundle", "--device", "cpu"]) == 2
    assert "device: got cpu, expected cuda:N" in capsys.readouterr().err
