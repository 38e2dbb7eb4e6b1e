"""What `auto` means: the preferred backend, unless another was measured faster here; and the types of options."""

import argparse
import json
import shutil
import sys
from types import SimpleNamespace

import pytest

import engines
from benchmarks.__main__ import main as benchmark
from engines import __main__ as cli
from engines import store
from engines.bundle import Bundle
from engines.cli.options import picture_size, positive
from engines.spec import EngineError
from engines.store import choose as choice
from engines.store.choose import choose
from runtime.__main__ import main as draw
from tests.conftest import why_no_gpu
from tests.engines.cases import without_backend
from tests.tools.small import small_bundle

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

PREFERRED = engines.backend("openvino").dtypes()[0]
ENGINES = [("openvino", PREFERRED), ("openvino", "fp32"), ("onnxruntime", "fp32")]
without_gpu = pytest.mark.skipif(why_no_gpu() is None, reason="is about a machine without an NVIDIA GPU")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A bundle with engines of the UNet, timed as they were built."""
    bundle = small_bundle(tmp_path_factory.mktemp("originals") / "small")
    for backend, dtype in ENGINES:
        store.build(bundle, "unet", config(bundle, backend, dtype))
    return bundle.path


@pytest.fixture
def bundle(original, tmp_path):
    return Bundle.open(shutil.copytree(original, tmp_path / "small"))


def config(bundle, backend, dtype, batch=2, **rest):
    return bundle.config("unet", backend=backend, dtype=dtype, size=(64, 64), batch=batch, **rest)


def rewrite(bundle, backend, dtype, **timing):
    """Change what the record of an engine says of its time; "timing=None" drops it."""
    file = store.find(bundle, "unet", config(bundle, backend, dtype)) / "engine.json"
    record = json.loads(file.read_text())
    record["timing"] = None if "timing" in timing else {**record["timing"], **timing}
    file.write_text(json.dumps(record))


def set_times(bundle, **seconds):
    for (backend, dtype), value in zip(ENGINES, seconds.values(), strict=False):
        rewrite(bundle, backend, dtype, seconds=value)


def test_a_built_engine_is_timed(bundle):
    record = store.Record.read(store.find(bundle, "unet", config(bundle, "openvino", "fp32")), "")
    assert 0 < record.timing.seconds < 1 and 3 <= record.timing.runs <= 10 and "cores" in record.timing.machine
    unchecked = store.build(bundle, "unet", config(bundle, "openvino", "fp32", batch=3), check=False)
    assert store.Record.read(unchecked, "").timing is None


@without_gpu
def test_without_figures_it_is_the_preferred_one():
    assert choose() == ("openvino", PREFERRED, "cpu", "preferred of what can be used here")
    assert choose(dtype="fp32")[:2] == ("openvino", "fp32") and choose("onnxruntime")[:2] == ("onnxruntime", "fp32")


def test_the_fastest_that_was_measured_wins(bundle):
    for fastest, times in ((1, {"a": 0.2, "b": 0.1, "c": 0.3}), (2, {"a": 0.2, "b": 0.1, "c": 0.0123})):
        if PREFERRED == "fp32":
            pytest.skip("this CPU computes in fp32 alone")
        set_times(bundle, **times)
        found = choose(bundle=bundle, device="cpu")
        assert found[:2] == ENGINES[fastest]
    assert found.why == "12.3 ms a step, the fastest measured here (openvino fp32 100 ms, " \
                        f"openvino {PREFERRED} 200 ms)"
    assert choose("openvino", bundle=bundle)[:2] == ("openvino", "fp32")
    assert choose("openvino", PREFERRED, bundle=bundle)[:2] == ("openvino", PREFERRED)
    assert choose(dtype="fp32", bundle=bundle, device="cpu")[:2] == ("onnxruntime", "fp32")


def test_what_was_never_measured_is_not_taken_for_slower(bundle):
    rewrite(bundle, "openvino", PREFERRED, timing=None)
    found = choose(bundle=bundle, device="cpu")
    assert found[:2] == ("openvino", PREFERRED)
    assert found.why.startswith("preferred of what can be used here; not measured here yet, unlike ")
    assert "onnxruntime fp32" in found.why


@pytest.mark.parametrize("why", ["another machine", "another size", "another batch", "other threads", "stale",
                                 "damaged", "not installed"])
def test_figures_that_do_not_count(bundle, monkeypatch, why):
    set_times(bundle, preferred=0.2, fp32=0.3 if PREFERRED != "fp32" else 0.2, other=0.1)
    asked = {"another size": {"size": (64, 128)}, "another batch": {"batch": 2}, "other threads": {"threads": 1}}
    assert choose(bundle=bundle, device="cpu").backend == "onnxruntime"
    path = store.find(bundle, "unet", config(bundle, "onnxruntime", "fp32"))
    if why == "another machine":
        rewrite(bundle, "onnxruntime", "fp32", machine="another, 64 cores")
    elif why == "stale":
        module = engines.backend("onnxruntime")
        monkeypatch.setattr(module, "versions", lambda c=None, real=module.versions: {**real(c), "onnxruntime": "9"})
    elif why == "damaged":
        (path / "engine.json").write_text("{")
    elif why == "not installed":
        monkeypatch.setattr(engines.backend("onnxruntime"), "available", lambda: "missing")
    assert choose(bundle=bundle, device="cpu", **asked.get(why, {})).backend == "openvino"


def backend_of_a_gpu(runnable):
    return SimpleNamespace(available=lambda: None, devices=lambda: ["cuda:0", "sm_90"], dtypes=lambda: ("fp16", "bf16"),
                           runnable=lambda config: runnable, on_gpu=True)


def test_a_gpu_goes_before_the_cpu_where_it_can_run(bundle, monkeypatch):
    gpu = backend_of_a_gpu(None)
    monkeypatch.setattr(choice, "gpus", lambda: [SimpleNamespace(arch="sm_90")])
    monkeypatch.setattr(choice, "opened", lambda name: gpu if name == "tensorrt" else engines.backend(name))
    assert choose(bundle=bundle)[:3] == ("tensorrt", "fp32", "cuda:0")  # the precision of the graph
    assert choose(device="cuda")[:3] == ("tensorrt", "fp16", "cuda:0")
    assert choose(device="sm_90")[:3] == ("tensorrt", "fp16", "sm_90")
    assert choose(device="cpu")[:1] == ("openvino",)
    gpu.runnable = lambda config: "another architecture"
    assert choose()[:1] == ("openvino",)
    with pytest.raises(EngineError, match=r"no engine can be used on cuda:0: .*backend tensorrt: another architecture"):
        choose(device="cuda:0")


def test_backends_that_this_version_does_not_have_are_passed_over():
    with without_backend("openvino"):
        assert choose(device="cpu")[:1] == ("onnxruntime",)


def test_nothing_that_can_be_used_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = r"no engine can be used on cpu: .*pip install openvino.*pip install onnxr"
    with without_backend("inductor"), pytest.raises(EngineError, match=message):
        choose(device="cpu")


@pytest.mark.parametrize(("words", "message"), [
    (("auto", "fp8"), "dtype: got 'fp8', expected auto or one of fp32"),
    (("tensorflow",), "backend: got 'tensorflow', expected one of"),
    (("openvino", "auto", "sm_89"), "backend openvino: got device sm_89, expected one of cpu"),
])
def test_unknown_names_are_refused(words, message):
    with pytest.raises(EngineError, match=message):
        choose(*words)


@pytest.mark.skipif(engines.backend("tensorrt-rtx").available() is not None, reason="tensorrt-rtx is not installed")
@without_gpu
def test_building_for_a_gpu_that_is_elsewhere():
    assert choose(device="sm_89", build=True)[:3] == ("tensorrt-rtx", "fp16", "sm_89")
    with pytest.raises(EngineError, match=r"no engine can be used on sm_89: .*got no NVIDIA GPU here"):
        choose(device="sm_89")


@without_gpu
def test_the_command_line_says_what_auto_is(bundle, capsys):
    set_times(bundle, preferred=0.2, fp32=0.3 if PREFERRED != "fp32" else 0.2, other=0.1)
    assert cli.main(["list", str(bundle.path)]) == 0
    out = capsys.readouterr().out
    assert "auto: onnxruntime fp32 on cpu: 100 ms a step, the fastest measured here (openvino" in out
    assert cli.main(["build", str(bundle.path), "--backend", "auto", "--component", "unet", "--json"]) == 0
    said = capsys.readouterr()
    assert "auto: onnxruntime fp32 on cpu: 100 ms" in said.err
    assert {(e["backend"], e["dtype"]) for e in json.loads(said.out)} == {("onnxruntime", "fp32")}


def test_types_of_options():
    assert (picture_size("512x768"), picture_size("64X32")) == ((512, 768), (64, 32))
    assert positive("12") == 12
    for wrong in ("", "x", "512", "512x", "x512", "1x2x3", "-1x2", "1.5x2"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected HEIGHTxWIDTH in pixels, such as 512x768"):
            picture_size(wrong)
    for wrong in ("0", "-1", "1.5", "many", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number of at least 1"):
            positive(wrong)


@without_gpu
@pytest.mark.parametrize(("words", "message"), [
    (["--device", "cuda:0"], "no engine can be used on cuda:0"),
    (["--device", "cuda:0", "--backend", "onnxruntime", "--dtype", "fp32"], "got device cuda:0, expected one of cpu"),
    (["--backend", "tensorrt-rtx"], "got device cuda:0 on a machine of 0 NVIDIA GPUs")])
def test_the_runtime_refuses_a_gpu_that_is_not_there(bundles, words, message, capsys):
    if "tensorrt-rtx" in words:
        pytest.importorskip("tensorrt_rtx_bindings")
    assert draw([str(bundles["sd1"]), "a cat", "--quiet", *words]) == 2
    assert message in capsys.readouterr().err


def test_graphs_are_not_measured_on_a_cpu(capsys):
    assert benchmark(["graphs", "no.bundle", "--device", "cpu"]) == 2
    assert "device: got cpu, expected cuda:N" in capsys.readouterr().err
