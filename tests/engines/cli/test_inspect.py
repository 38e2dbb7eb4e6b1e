"""`python -m engines inspect`: kernels, times and memory of an engine, as its library tells them."""

import json
import shutil
from collections import Counter

import pytest

import engines
from engines import __main__ as cli
from engines import store
from engines.backend import Layer
from engines.bundle import Bundle
from engines.cli import layers
from kernels.cpu import library
from tests.tools.small import small_bundle

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """With an engine of the UNet of each CPU backend, and one of OpenVINO's own attention."""
    found = small_bundle(tmp_path_factory.mktemp("bundles") / "small")
    for rest in ({"backend": "onnxruntime"}, {"backend": "openvino"},
                 {"backend": "openvino", "options": {"attention": "openvino"}}):
        store.build(found, "unet", config(found, **rest))
    return found


def config(bundle, **rest):
    return bundle.config("unet", size=(64, 64), batch=2, **rest)


def run(capsys, *words):
    status = cli.main([str(w) for w in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def look(capsys, bundle, *words):
    status, out, _ = run(capsys, "inspect", bundle.path, *words, "--json")
    assert status == 0
    return json.loads(out)


def extension_is_built():
    try:
        return bool(library.openvino_extension())
    except library.CpuKernelError:
        return False


def test_openvino_tells_which_kernels_it_chose(bundle, capsys):
    found = look(capsys, bundle, "--engine", "unet-openvino")
    assert len(found) == 2
    for engine in found:
        types = Counter(layer["type"] for layer in engine["layers"])
        assert types["Convolution"] == 2 and types["FullyConnected"] == 4
        assert {layer["precision"] for layer in engine["layers"]} == {"f32"}
        assert all(layer["seconds"] is None for layer in engine["layers"])
        assert sum(row["layers"] for row in engine["kernels"]) == len(engine["layers"])
        own = {layer["type"] for layer in engine["layers"] if layer["kernel"] == "latentrt"}
        theirs = engine["config"]["options"].get("attention") == "openvino"
        if extension_is_built():
            assert own == ({"GroupNormSilu"} if theirs else {"Attention", "GroupNormSilu"})
        assert engine["now"] > 0 and engine["resident_bytes"] >= 0 and engine["versions"]["openvino"]


def test_onnxruntime_tells_its_nodes(bundle, capsys):
    engine, = look(capsys, bundle, "--engine", "unet-onnxruntime", "--profile")
    types = Counter(layer["type"] for layer in engine["layers"])
    assert types["Conv"] == 2 and types["Attention"] == 1 and types["Sin"] == types["Cos"] == 1
    assert {layer["kernel"] for layer in engine["layers"]} == {"CPU"}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_profile_has_the_time_of_every_layer(bundle, capsys, backend):
    for engine in look(capsys, bundle, "--engine", f"unet-{backend}", "--profile"):
        seconds = [layer["seconds"] for layer in engine["layers"]]
        assert all(s >= 0 for s in seconds) and 0 < sum(seconds) < 1
        assert sum(row["seconds"] for row in engine["kernels"]) == pytest.approx(sum(seconds))
        times = [row["seconds"] for row in engine["kernels"]]
        assert times == sorted(times, reverse=True)


def test_what_is_slow_comes_first(bundle, capsys):
    status, out, _ = run(capsys, "inspect", bundle.path, "--engine", "unet-onnxruntime", "--profile", "--top", 3)
    assert status == 0
    head, kernels, slowest = out.split("\n\n")
    assert "version onnxruntime: " in head and "a call took " in head and "opening and running it takes " in head
    assert kernels.splitlines()[0].split() == ["time", "share", "layers", "precision", "type", "kernel"]
    assert slowest.splitlines()[0] == "the 3 layers that take longest" and len(slowest.strip().splitlines()) == 2 + 3
    shares = [float(line.split()[2]) for line in slowest.splitlines()[2:] if line]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100
    status, out, _ = run(capsys, "inspect", bundle.path, "--engine", "unet-onnxruntime", "--layers")
    assert status == 0 and "every layer, in order" in out and "time" not in out.split("every layer")[1]


def test_the_overview_opens_nothing_and_has_build_and_call_times(bundle, capsys, monkeypatch):
    monkeypatch.setattr(engines.backend("openvino"), "load", None)
    status, out, _ = run(capsys, "inspect", bundle.path)
    assert status == 0 and "provenance" in out and "--engine NAME --profile" in out
    assert max(map(len, out.splitlines())) < 500, "parts of a UNet have dozens of inputs"
    header = next(line for line in out.splitlines() if line.startswith("engine "))
    assert header.split()[:6] == ["engine", "rows", "and", "pixels", "dtype", "build"] and " call " in header
    assert all(e["timing"]["seconds"] > 0 for e in look(capsys, bundle)["engines"])


def test_engines_that_cannot_be_opened_say_why(bundle, capsys, monkeypatch, tmp_path):
    status, _, err = run(capsys, "inspect", bundle.path, "--engine", "vae")
    assert status == 2 and "--engine: got 'vae', expected how one of these begins: unet-onnxruntime-" in err
    module = engines.backend("openvino")
    with monkeypatch.context() as patch:
        patch.setattr(module, "versions", lambda c=None, real=module.versions: {**real(c), "openvino": "9"})
        found = look(capsys, bundle, "--engine", "unet-openvino", "--profile")
        assert all(e["why"].startswith("stale: versions.openvino: ") and "layers" not in e for e in found)
    copy = Bundle.open(shutil.copytree(bundle.path, tmp_path / "small"))
    for path in (copy.path / "engines").iterdir():
        (path / "engine.json").write_text("{")
    status, out, _ = run(capsys, "inspect", copy.path, "--profile")
    assert status == 0 and out.count("not opened: damaged: ") == 3 and "python -m engines build" in out


def test_what_a_backend_recorded_is_shown(bundle, capsys, monkeypatch):
    rows = [{"name": "conv", "kind": "CaskConv", "kernel": "sm90_xmma", "milliseconds": 0.5},
            {"name": "attention", "kind": None, "kernel": None, "milliseconds": 1.5},
            {"name": "cast", "kind": "Cast", "kernel": 17, "milliseconds": None}]
    module = engines.backend("onnxruntime")
    monkeypatch.setattr(module, "details", lambda directory: {"plan": directory.name, "warnings": ["slow"] * 99,
                                                              "engine_layers": rows})
    monkeypatch.setattr(module, "layers", lambda *given: None)
    engine, = look(capsys, bundle, "--engine", "unet-onnxruntime")
    assert engine["details"] == {"plan": engine["name"], "warnings": ["slow"] * 99}
    assert [layer["seconds"] for layer in engine["layers"]] == [0.0005, 0.0015, None] and not engine["why"]
    out = run(capsys, "inspect", bundle.path, "--engine", engine["name"])[1]
    assert f"plan: {engine['name']}" in out and "warnings: 99 entries (see --json)" in out
    slowest = out.split("\n\n")[2].splitlines()
    assert slowest[2].split() == ["1.5", "ms", "75.0", "%", "attention"]
    assert slowest[-1].split() == ["Cast", "17", "cast"]


def test_a_backend_that_tells_nothing_says_so(bundle, capsys, monkeypatch):
    monkeypatch.setattr(engines.backend("onnxruntime"), "layers", lambda *given: None)
    engine, = look(capsys, bundle, "--engine", "unet-onnxruntime")
    assert engine["now"] > 0 and engine["why"] == "onnxruntime does not tell of its layers"
    assert "onnxruntime does not tell" in run(capsys, "inspect", bundle.path, "--engine", engine["name"])[1]


def test_layers_are_counted_by_kernel():
    found = [Layer("a", "Conv", "amx", "bf16", 0.1), Layer("b", "Conv", "jit", "bf16", 0.5),
             Layer("c", "Conv", "amx", "bf16", 0.2)]
    rows = layers.by_kernel(found)
    assert [(r["kernel"], r["layers"], r["seconds"]) for r in rows] == [("jit", 1, 0.5),
                                                                       ("amx", 2, pytest.approx(0.3))]
    assert [layer.name for layer in layers.slowest(found, 2)] == ["b", "c"]
    assert layers.total(found) == pytest.approx(0.8)
    assert layers.total([*found, Layer("d", "Conv", "amx", "bf16")]) == pytest.approx(0.8)
    assert layers.total([Layer("d", "Conv", "amx", "bf16")]) is None
