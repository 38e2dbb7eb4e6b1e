"""Engines of every CPU backend: right, bound to the caller's memory, refitted; light to load."""

import dataclasses
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest

import engines
from engines import store
from engines.bundle import Bundle
from engines.check import compare
from engines.onnx.initializers import initializers
from engines.spec import EngineError
from tests.engines.cases import BACKENDS, CASES, bound, config, rel_rms, unet, weights
from tests.tolerances import ENGINE_REL_RMS

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

ROOT = Path(__file__).parents[2]
SHAPES = [pytest.param(64, 64, 1, id="64x64-1"), pytest.param(64, 96, 2, id="64x96-2")]


@pytest.mark.parametrize(("height", "width", "batch"), SHAPES)
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_equals_torch(bundle, backend, dtype, height, width, batch):
    engine = store.load(bundle, "unet", config(bundle, backend, size=(height, width), batch=batch, dtype=dtype))
    feed = compare.inputs(engine.inputs.values(), 3)
    got = compare.run(engine, feed)["noise_pred"]
    assert got.shape == (batch, 4, height // 8, width // 8)
    assert rel_rms(got, unet(weights(bundle), feed)) < ENGINE_REL_RMS[dtype]


@pytest.mark.parametrize("external", [True, False], ids=["external", "inline"])
@pytest.mark.parametrize("graph", ["fp16", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_16_bit_graphs_in_fp32_equal_torch(originals, tmp_path, backend, graph, external):
    bundle = Bundle.open(shutil.copytree(originals[graph, external], tmp_path / "small"))
    engine = store.load(bundle, "unet", config(bundle, backend, batch=2))
    feed = compare.inputs(engine.inputs.values(), 3)
    assert rel_rms(compare.run(engine, feed)["noise_pred"], unet(weights(bundle), feed)) < ENGINE_REL_RMS["fp32"]


def test_a_widened_graph_holds_no_second_copy_of_the_weights(originals, tmp_path):
    bundle = Bundle.open(shutil.copytree(originals["fp16", True], tmp_path / "small"))
    path = store.build(bundle, "text_encoder", config(bundle, "onnxruntime", "text_encoder"))
    assert (path / "widened.onnx").stat().st_size < 0.2 * (bundle.path / "text_encoder.onnx.data").stat().st_size


@pytest.mark.parametrize("component", ["text_encoder", "vae_decoder"])
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_other_components_equal_the_reference(bundle, component, backend, dtype):
    own = config(bundle, backend, component, size=(64, 96), batch=2, dtype=dtype)
    engine = store.load(bundle, component, own)
    feed = compare.inputs(engine.inputs.values(), 5)
    expected = compare.reference(bundle, component, own, feed)
    for name, value in compare.run(engine, feed).items():
        assert rel_rms(value, expected[name]) < ENGINE_REL_RMS[dtype]


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_timesteps_are_never_rounded(bundle, backend, dtype):
    """bfloat16 has no 999, and half a step apart is another angle: the embedding stays in fp32."""
    engine = store.load(bundle, "unet", config(bundle, backend, dtype=dtype))
    buffers = bound(engine)
    errors = {}
    for timestep in (0.0, 801.0, 999.0, 998.5):
        buffers["timestep"][:] = timestep
        engine.enqueue()
        feed = {name: buffers[name] for name in engine.inputs}
        errors[timestep] = rel_rms(buffers["noise_pred"], unet(weights(bundle), feed))
    assert max(errors.values()) < 2 * errors[0.0] + 5e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_enqueue_reads_and_writes_the_bound_memory(bundle, backend):
    engine = store.load(bundle, "unet", config(bundle, backend))
    buffers = bound(engine)
    engine.enqueue()
    first = buffers["noise_pred"].copy()
    buffers["sample"][:] *= 0.5
    engine.enqueue()
    feed = {name: buffers[name] for name in engine.inputs}
    assert rel_rms(buffers["noise_pred"], unet(weights(bundle), feed)) < ENGINE_REL_RMS["fp32"]
    assert rel_rms(buffers["noise_pred"], first) > 1e-2
    buffers["sample"][:] *= 2
    engine.enqueue()
    np.testing.assert_array_equal(buffers["noise_pred"], first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "change", "message"), [
    ("sample", lambda a: a.astype(np.float64), r"bind sample: got float64 \[1, 4, 8, 8\], expected float32"),
    ("sample", lambda a: a[:, :, :4], r"got float32 \[1, 4, 4, 8\], expected float32 \[1, 4, 8, 8\]"),
    ("sample", lambda a: np.asfortranarray(a), "not C-contiguous"),
    ("noise_pred", lambda a: np.broadcast_to(np.float32(0), a.shape), "not C-contiguous or not writeable"),
    ("sample", lambda a: a.tolist(), "got list, expected a numpy array"),
    ("sample", lambda a: None, "got NoneType"),
], ids=["dtype", "shape", "fortran", "read-only", "list", "none"])
def test_bind_refuses(bundle, backend, name, change, message):
    engine = store.load(bundle, "unet", config(bundle, backend))
    buffers = bound(engine)
    with pytest.raises(EngineError, match=message):
        engine.bind({**buffers, name: change(buffers[name])})


@pytest.mark.parametrize("backend", BACKENDS)
def test_bind_wants_exactly_the_names(bundle, backend):
    engine = store.load(bundle, "unet", config(bundle, backend))
    with pytest.raises(EngineError, match="call bind first"):
        engine.enqueue()
    buffers = bound(engine)
    with pytest.raises(EngineError, match="expected exactly"):
        engine.bind({**buffers, "extra": buffers["sample"]})
    del buffers["timestep"]
    with pytest.raises(EngineError, match=r"expected exactly.*timestep"):
        engine.bind(buffers)


@pytest.mark.parametrize("external", [True, False], ids=["external", "inline"])
@pytest.mark.parametrize("graph", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_refit_changes_weights_and_back(originals, tmp_path, backend, graph, external):
    bundle = Bundle.open(shutil.copytree(originals[graph, external], tmp_path / "small"))
    engine = store.load(bundle, "unet", config(bundle, backend))
    buffers = bound(engine)
    feed = {name: buffers[name] for name in engine.inputs}
    engine.enqueue()
    before = buffers["noise_pred"].copy()
    old = weights(bundle)
    changed = {name: old[name] * 1.5 for name in ("conv_in.weight", "norm.weight", "query.weight", "conv_in.bias")}
    for names in (("conv_in.weight",), ("norm.weight", "query.weight", "conv_in.bias")):  # the first call's are kept
        engine.refit({name: changed[name].astype(np.float32) for name in names})
    engine.enqueue()
    narrow = {"fp32": np.float32, "fp16": np.float16, "bf16": None}[graph]
    rounded = {n: v.astype(narrow) if narrow else torch.from_numpy(v).bfloat16().double().numpy()
               for n, v in changed.items()}
    expected = unet({**old, **{n: v.astype(np.float64) for n, v in rounded.items()}}, feed)
    assert rel_rms(before, expected) > 1e-2
    assert rel_rms(buffers["noise_pred"], expected) < ENGINE_REL_RMS["fp32"]
    engine.refit({name: old[name].astype(np.float32) for name in changed})
    engine.enqueue()
    np.testing.assert_array_equal(buffers["noise_pred"], before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_refit_refuses_and_changes_nothing(bundle, backend):
    engine = store.load(bundle, "unet", config(bundle, backend))
    buffers = bound(engine)
    engine.enqueue()
    before = buffers["noise_pred"].copy()
    good = np.zeros(32, np.float32)
    for name, value, message in (("conv.weight", good, "unknown weights conv.weight"),
                                 ("norm.weight", good[1:], r"weight norm.weight: got shape \(31,\), expected \(32,\)"),
                                 ("norm.weight", good.astype(np.int32), "expected floating-point")):
        with pytest.raises(EngineError, match=message):
            engine.refit({"norm.bias": good, name: value})
    engine.enqueue()
    np.testing.assert_array_equal(buffers["noise_pred"], before)


@pytest.mark.parametrize("external", [True, False], ids=["external", "inline"])
def test_initializers_are_those_that_onnx_reads(originals, external):
    file = originals["bf16", external] / "unet.onnx"
    expected = {w.name: (w.data_type, tuple(w.dims), w.data_location == 1)
                for w in onnx.load(file, load_external_data=False).graph.initializer}
    assert {n: dataclasses.astuple(w) for n, w in initializers(file.read_bytes()).items()} == expected
    with pytest.raises(EngineError, match="not an ONNX model"):
        initializers(file.read_bytes()[:-5])


def test_a_16_bit_engine_on_a_cpu_is_refused_by_onnxruntime(bundle):
    with pytest.raises(EngineError, match=r"got dtype fp16.*--dtype fp32"):
        store.build(bundle, "unet", config(bundle, "onnxruntime", dtype="fp16"))
    assert os.listdir(bundle.path / "engines") == []


def test_unusable_devices_and_options_are_refused(bundle):
    for backend, rest, message in (("onnxruntime", {"device": "cuda:0"}, "no CUDAExecutionProvider.*onnxruntime-gpu"),
                                   ("onnxruntime", {"device": "gpu"}, "got device 'gpu', expected cpu"),
                                   ("onnxruntime", {"options": {"x": 1}}, "unknown options"),
                                   ("openvino", {"device": "cuda:0"}, "got device"),
                                   ("openvino", {"options": {"SURPRISE": "1"}}, "SURPRISE"),
                                   ("openvino", {"options": {"x": object()}}, "JSON values only")):
        if backend == "onnxruntime" and "cuda:0" in engines.backend(backend).devices():
            continue
        with pytest.raises(EngineError, match=message):
            store.build(bundle, "unet", config(bundle, backend, **rest))
    with pytest.raises(EngineError, match="backend: got 'tensorflow', expected one of onnxruntime, openvino"):
        engines.backend("tensorflow")


def test_loading_and_running_imports_nothing_heavy(bundle):
    for backend in BACKENDS:
        store.build(bundle, "unet", config(bundle, backend))
    code = textwrap.dedent(f"""
        import sys
        import engines
        light = {{"onnxruntime", "openvino", "tqdm"}} & set(sys.modules)
        assert not light, light
        from engines import store
        bundle = engines.Bundle.open({str(bundle.path)!r})
        for backend in {BACKENDS!r}:
            engine = store.load(bundle, "unet", bundle.config("unet", backend=backend, size=(64, 64), batch=1))
            engine.refit({{"norm.bias": engine.inputs["timestep"].empty().repeat(32) * 0}})
        heavy = {{"torch", "onnx", "onnx_ir", "onnxscript", "diffusers", "transformers"}} & set(sys.modules)
        assert not heavy, heavy
    """)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_import_is_quick():
    code = "import numpy, time; t = time.perf_counter(); import engines; print(time.perf_counter() - t)"
    best = min(float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                                    check=True).stdout) for _ in range(3))
    assert best < 0.5
