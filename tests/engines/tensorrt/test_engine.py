"""Engines on the GPU that they were built for; for both flavours."""

import json
import shutil

import numpy as np
import onnx
import pytest

from engines import store
from engines.bundle import Bundle
from engines.check import compare
from engines.check.tolerance import TOLERANCE
from engines.machine.gpu import Memory
from engines.spec import EngineError
from engines.tensorrt.backend import ENTERPRISE
from engines.tensorrt.record import ABOUT
from tests.cases.tensorrt import config, for_this_gpu


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_equals_the_reference(originals, tmp_path, name, dtype):
    for_this_gpu(name)
    bundle = Bundle.open(shutil.copytree(originals[dtype], tmp_path / "small"))
    path = store.build(bundle, "unet", config(bundle, backend=name, device="cuda:0"))
    check = store.Record.read(path, "").check
    assert check is not None and 0 < check.rel_rms < TOLERANCE[dtype]
    assert json.loads((path / ABOUT).read_text())["device_memory_bytes"] >= 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_refit_changes_weights_and_back(bundle, name):
    for_this_gpu(name)
    engine = store.load(bundle, "unet", config(bundle, backend=name, device="cuda:0", options={"refit": "true"}))
    feed = compare.inputs(engine.inputs.values(), 3)
    before = compare.run(engine, feed)["noise_pred"]
    old = onnx.numpy_helper.to_array(next(
        w for w in onnx.load(bundle.path / "unet.onnx").graph.initializer if w.name == "conv_out.weight"))
    engine.refit({"conv_out.weight": 2 * old})
    np.testing.assert_allclose(compare.run(engine, feed)["noise_pred"], 2 * before, rtol=1e-3, atol=1e-4)
    engine.refit({"conv_out.weight": old})
    np.testing.assert_allclose(compare.run(engine, feed)["noise_pred"], before, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["attention", "norm"])
def test_our_kernels_as_plugins_equal_the_reference(bundles, tmp_path, kind):
    for_this_gpu("tensorrt")
    bundle = Bundle.open(shutil.copytree(bundles["sd2"], tmp_path / "sd2", ignore=shutil.ignore_patterns("engines")))
    options = {"attention": "vendor", "norm": "vendor"} | {kind: "ours"}
    path = store.build(bundle, "unet", config(bundle, backend="tensorrt", device="cuda:0", options=options))
    about = ENTERPRISE.details(path)
    assert about["kernels"][kind] == {"asked": "ours", "used": "ours"} and about["sites"][kind]["ours"] > 0
    check = store.Record.read(path, "").check
    assert check is not None and check.rel_rms < TOLERANCE["fp32"]


@pytest.mark.gpu
def test_auto_times_every_build_and_says_what_is_inside(bundles, tmp_path):
    for_this_gpu("tensorrt")
    bundle = Bundle.open(shutil.copytree(bundles["sd2"], tmp_path / "sd2", ignore=shutil.ignore_patterns("engines")))
    path = store.build(bundle, "vae_decoder", config(bundle, "vae_decoder", backend="tensorrt", device="cuda:0"))
    about = ENTERPRISE.details(path)
    assert not about["failed"] and {len(t["ours"]) for t in about["timings"]} >= {0, 1}
    best = min(about["timings"], key=lambda t: t["seconds"])
    assert {kind for kind, used in about["kernels"].items() if used["used"] == "ours"} == set(best["ours"])
    assert any(layer["kernel"] for layer in about["engine_layers"])
    assert sum(layer["milliseconds"] or 0 for layer in about["engine_layers"]) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_engines_share_a_workspace(bundle, name):
    for_this_gpu(name)
    opened = [store.load(bundle, part, config(bundle, part, backend=name, device="cuda:0"))
              for part in ("unet", "vae_decoder")]
    feeds = [compare.inputs(engine.inputs.values(), 3) for engine in opened]
    alone = [compare.run(engine, feed) for engine, feed in zip(opened, feeds, strict=True)]
    block = Memory(0, max(1, *(engine.workspace_bytes for engine in opened)))
    for engine in opened:
        engine.use_workspace(block)
    for _ in range(2):
        for engine, feed, expected in zip(opened, feeds, alone, strict=True):
            for output, value in compare.run(engine, feed).items():
                np.testing.assert_array_equal(value, expected[output])
    with pytest.raises(EngineError, match="workspace"):
        opened[0].use_workspace(block.handle + 1)
