"""Engines of the inductor backend: packages that open without a compiler and take new weights.

Builds compile C++, so that few are made: of the small bundle, and of the tiny text encoder for fused projections.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from engines.bundle import Bundle
from engines.check import compare
from engines.inductor.backend import INDUCTOR
from engines.inductor.options import ON_CPU
from engines.inductor.record import CONSTANTS, PACKAGE, RECORD
from engines.spec import EngineConfig, EngineError
from engines.store import store
from kernels.cpu import library
from tests.engines.cases import bound, rel_rms, unet, weights
from tests.engines.inductor.graphs import config
from tests.tolerances import ENGINE_REL_RMS, IMAGE_MAX
from tests.tools.small import small_bundle

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[3]
KERNELS_OF = {"fp32": {}, "bf16": {} if library.available() else dict.fromkeys(ON_CPU, "ours")}
"""Options of the small UNet in each dtype: in fp32 both kernels are timed, in bf16 the C++ ones are asked for."""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The small bundle with its UNet built in fp32 and, where this CPU has it, bf16, each with other kernels."""
    bundle = small_bundle(tmp_path_factory.mktemp("inductor") / "small")
    for dtype in INDUCTOR.dtypes():
        store.build(bundle, "unet", config(bundle, dtype=dtype, options=KERNELS_OF[dtype]))
    return bundle


@pytest.fixture(scope="module")
def text(bundles, tmp_path_factory):
    """A tiny text encoder, built."""
    bundle = Bundle.open(shutil.copytree(bundles["sd1"], tmp_path_factory.mktemp("inductor") / "sd1"))
    store.build(bundle, "text_encoder", config(bundle, "text_encoder"))
    return bundle


@pytest.mark.parametrize("dtype", INDUCTOR.dtypes())
def test_an_engine_equals_torch_at_every_timestep(small, dtype):
    """In float64; and no timestep is rounded on the way: bfloat16 has no 999."""
    engine = store.load(small, "unet", config(small, dtype=dtype, options=KERNELS_OF[dtype]))
    buffers = bound(engine)
    errors = {}
    for timestep in (0.0, 801.0, 999.0, 998.5):
        buffers["timestep"][:] = timestep
        engine.enqueue()
        errors[timestep] = rel_rms(buffers["noise_pred"], unet(weights(small), {n: buffers[n] for n in engine.inputs}))
    assert max(errors.values()) < ENGINE_REL_RMS[dtype]
    assert max(errors.values()) < 2 * errors[0.0] + 5e-6


def test_what_a_build_leaves(small):
    path = store.find(small, "unet", config(small))
    assert sorted(os.listdir(path)) == sorted(["engine.json", PACKAGE, RECORD, CONSTANTS])
    record = store.Record.read(path, "")
    assert 0 < record.check.rel_rms < ENGINE_REL_RMS["fp32"]
    found = INDUCTOR.details(path)
    assert {kind: sum(sites.values()) for kind, sites in found["sites"].items()} == {
        "attention": 1, "norm": 1, "layer_norm": 1}
    timed = {} if library.available() else dict.fromkeys(ON_CPU, "auto")
    assert {kind: one["asked"] for kind, one in found["kernels"].items()} == dict.fromkeys(
        found["sites"], "vendor") | timed
    assert {row["kind"] for row in found["timings"]} == set(timed) and not found["failed"]
    for row in found["timings"]:
        assert row["used"] == min(row["seconds"], key=row["seconds"].__getitem__)
        assert found["sites"][row["kind"]] == {row["used"]: row["sites"]}
        assert found["kernels"][row["kind"]]["used"] == row["used"]


@pytest.mark.skipif(bool(library.available()) or "bf16" not in INDUCTOR.dtypes(), reason="needs C++ kernels and bf16")
def test_the_kernels_that_are_asked_for_are_used(small):
    found = INDUCTOR.details(store.find(small, "unet", config(small, dtype="bf16", options=KERNELS_OF["bf16"])))
    assert found["sites"] == {"attention": {"ours": 1}, "norm": {"ours": 1}, "layer_norm": {"vendor": 1}}
    assert found["timings"] == [] and found["kernels"]["attention"] == {"asked": "ours", "used": "ours"}


def test_enqueue_reads_and_writes_the_bound_memory(small):
    engine = store.load(small, "unet", config(small))
    with pytest.raises(EngineError, match="call bind first"):
        engine.enqueue()
    buffers = bound(engine)
    engine.enqueue()
    first = buffers["noise_pred"].copy()
    buffers["sample"][:] *= 0.5
    engine.enqueue()
    assert rel_rms(buffers["noise_pred"], first) > 1e-2
    buffers["sample"][:] *= 2
    engine.enqueue()
    np.testing.assert_array_equal(buffers["noise_pred"], first)
    for name, wrong, message in (("sample", buffers["sample"][:1].copy(), "bind sample: got float32"),
                                 ("sample", buffers["sample"].tolist(), "got list, expected a numpy array"),
                                 ("noise_pred", np.broadcast_to(np.float32(0), (2, 4, 8, 8)), "not writeable")):
        with pytest.raises(EngineError, match=message):
            engine.bind({**buffers, name: wrong})
    with pytest.raises(EngineError, match="expected exactly"):
        engine.bind({**buffers, "extra": first})


def test_refit_changes_weights_and_back(small):
    engine = store.load(small, "unet", config(small))
    buffers = bound(engine)
    feed = {name: buffers[name] for name in engine.inputs}
    engine.enqueue()
    before, old = buffers["noise_pred"].copy(), weights(small)
    changed = {name: old[name] * 1.5 for name in ("conv_in.weight", "norm.weight", "query.weight", "conv_in.bias",
                                                  "frequencies")}
    for names in (("conv_in.weight",), tuple(changed)[1:]):  # the first call's are kept
        engine.refit({name: changed[name].astype(np.float32) for name in names})
    engine.enqueue()
    expected = unet({**old, **changed}, feed)
    assert rel_rms(before, expected) > 1e-2
    assert rel_rms(buffers["noise_pred"], expected) < ENGINE_REL_RMS["fp32"]
    engine.refit({name: old[name].astype(np.float32) for name in changed})
    engine.enqueue()
    np.testing.assert_array_equal(buffers["noise_pred"], before)


def test_refit_refuses_and_changes_nothing(small):
    engine = store.load(small, "unet", config(small))
    buffers = bound(engine)
    engine.enqueue()
    before = buffers["noise_pred"].copy()
    good = np.zeros(32, np.float32)
    constant = next(name for name in weights(small) if name.startswith("constant_"))
    for name, value, message in (("conv.weight", good, "unknown weights conv.weight"),
                                 ("norm.weight", good[1:], r"weight norm.weight: got shape \(31,\), expected \(32,\)"),
                                 (constant, np.zeros(1, np.float32), "expected floating-point")):
        with pytest.raises(EngineError, match=message):
            engine.refit({"norm.bias": good, name: value})
    engine.enqueue()
    np.testing.assert_array_equal(buffers["noise_pred"], before)


def test_a_part_of_a_fused_weight_is_refitted(text):
    """Equal to the reference with the same weights; the other projections of the product stay as they are."""
    own = config(text, "text_encoder")
    engine = store.load(text, "text_encoder", own)
    reference = store.load(text, "text_encoder", dataclasses.replace(own, backend="onnxruntime"))
    feed = compare.inputs(engine.inputs.values(), 5)
    before = compare.run(engine, feed)["hidden_states"]
    assert rel_rms(before, compare.run(reference, feed)["hidden_states"]) < ENGINE_REL_RMS["fp32"]
    rng = np.random.default_rng(0)
    layer = "encoder.layers.1.self_attn"
    changed = {f"{layer}.k_proj.weight": rng.standard_normal((32, 32)).astype(np.float32),
               f"{layer}.v_proj.bias": rng.standard_normal(32).astype(np.float32)}
    for each in (engine, reference):
        each.refit(changed)
    expected = compare.run(reference, feed)["hidden_states"]
    assert rel_rms(before, expected) > 1e-2
    assert rel_rms(compare.run(engine, feed)["hidden_states"], expected) < ENGINE_REL_RMS["fp32"]


def test_a_fresh_process_opens_it_without_a_compiler(small):
    """And says what is missing where it is asked to build."""
    engine = store.load(small, "unet", config(small))
    expected = compare.run(engine, compare.inputs(engine.inputs.values(), 6))["noise_pred"]
    code = textwrap.dedent(f"""
        import sys
        import engines
        from engines.check import compare
        from engines.store import store
        bundle = engines.Bundle.open({str(small.path)!r})
        own = bundle.config("unet", backend="inductor", size=(64, 64), batch=2)
        engine = store.load(bundle, "unet", own)
        out = compare.run(engine, compare.inputs(engine.inputs.values(), 6))["noise_pred"]
        sys.stdout.buffer.write(out.tobytes())
        heavy = {{"onnx", "onnx_ir", "onnxscript", "diffusers", "transformers", "triton"}} & set(sys.modules)
        assert not heavy - {{"triton"}}, heavy
        try:
            store.build(bundle, "vae_decoder", bundle.config("vae_decoder", backend="inductor", size=(64, 64),
                                                               batch=1))
        except engines.EngineError as e:
            sys.stderr.write(str(e))
    """)
    env = {name: value for name, value in os.environ.items() if name not in ("CXX", "PYTHONPATH")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=120,
                          env={**env, "PATH": "/nowhere"})
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.frombuffer(done.stdout, np.float32).reshape(expected.shape), expected)
    assert b"got no C++ compiler, expected g++" in done.stderr
    assert not list((small.path / "engines").glob("*vae_decoder*"))


@pytest.mark.parametrize(("rest", "message"), [
    ({"device": "gpu"}, "got device 'gpu', expected cpu or cuda:N"),
    ({"device": "cuda:99"}, "got device cuda:99 on a machine of"),
    ({"options": {"surprise": "1"}}, "got option 'surprise', expected one of attention, norm"),
    ({"options": {"attention": "flash"}}, "option attention: got 'flash', expected ours, vendor or auto"),
    ({"options": {"geglu": "ours"}}, "option geglu: got ours on cpu, expected vendor"),
    ({"options": {"layer_norm": "auto"}}, "option layer_norm: got auto on cpu, expected vendor: that kernel of ours"),
    ({"options": {"fp8": "yes"}}, "option fp8: got 'yes', expected linear or none"),
    ({"options": {"fp8_least": "0"}}, "option fp8_least: got '0', expected a whole number of at least 1"),
    ({"options": {"fuse": "maybe"}}, "option fuse: got 'maybe', expected true or false"),
    ({"dtype": "fp16"}, "got dtype fp16.*computes in.*--dtype fp32"),
], ids=str)
def test_what_cannot_be_built_is_refused(small, rest, message):
    before = sorted(os.listdir(small.path / "engines"))
    with pytest.raises(EngineError, match=message):
        store.build(small, "unet", config(small, **rest))
    assert sorted(os.listdir(small.path / "engines")) == before


@pytest.mark.slow
def test_a_pipeline_draws_the_reference_picture(bundles, tmp_path):
    """All engines of a tiny model; and a bias of four values, which a compiler would make a literal, is refitted.

    Quick, as compiling goes: one level each, and the refitted engine is the picture's.
    """
    from runtime import Pipeline, Request

    bundle = Bundle.open(shutil.copytree(bundles["sd1_one_level"], tmp_path / "bundle"))
    request = Request("a cat and a horse", steps=3, seed=5, height=16, width=16, scheduler="ddim")
    pictures = []
    for backend in ("onnxruntime", "inductor"):
        pipe = Pipeline.load(bundle.path, backend, dtype="fp32", size=(16, 16))
        pictures.append(pipe.decode(pipe(request).latents))
    np.testing.assert_allclose(pictures[1], pictures[0], atol=IMAGE_MAX, rtol=0)
    own = config(bundle, "unet_body", size=(16, 16))
    built = set(store.engine_directories(bundle))
    changed = {"conv_out.bias": np.float32([1, 2, 3, 4])}
    outputs = []
    for backend in ("onnxruntime", "inductor"):
        engine = store.load(bundle, "unet_body", dataclasses.replace(own, backend=backend))
        engine.refit(changed)
        outputs.append(compare.run(engine, compare.inputs(engine.inputs.values(), 1))["noise_pred"])
    assert rel_rms(outputs[1], outputs[0]) < ENGINE_REL_RMS["fp32"]
    assert set(store.engine_directories(bundle)) == built


def test_versions_name_the_device():
    """And the C++ kernels, where an engine may hold calls of them."""
    named = {"inductor", "cpu", "arch", "isa"}
    assert set(INDUCTOR.versions(EngineConfig("inductor"))) == named | (set() if library.available() else {"kernels"})
    own = EngineConfig("inductor", options=dict.fromkeys(ON_CPU, "vendor"))
    assert set(INDUCTOR.versions(own)) == named
    assert INDUCTOR.versions()["inductor"].startswith(torch.__version__.partition("+")[0])
