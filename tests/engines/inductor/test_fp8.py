"""Linear layers in float8: which, how exactly, through compiling, opening and refitting an engine."""

import dataclasses
import shutil

import numpy as np
import pytest

import engines
from engines import store
from engines.bundle import Bundle
from engines.check import compare
from engines.check.tolerance import TOLERANCE
from engines.inductor import nodes as onnx_nodes
from engines.inductor.options import LEAST, check_fp8
from engines.machine.buffers import resolve
from engines.spec import EngineError
from tests.engines.inductor.test_backend import config, quick  # noqa: F401  quick: compiles without trying instructions
from tests.engines.cases import rel_rms
from tests.tolerances import ENGINE_REL_RMS

torch = pytest.importorskip("torch")

from engines.inductor import fp8 as inductor_fp8  # noqa: E402
from engines.inductor import module as onnx_torch  # noqa: E402

FP8 = {"fp8": "linear", "fp8_least": "32", "attention": "torch", "group_norm": "torch"}


@pytest.mark.parametrize(("rows", "inputs", "outputs", "least", "fits"), [
    (2048, 640, 640, LEAST, True), (2048, 640, 5120, LEAST, True), (639, 640, 640, LEAST, False),
    (8192, 320, 2560, LEAST, False), (8192, 1280, 320, LEAST, False), (8192, 648, 640, LEAST, False),
    (8192, 640, 648, LEAST, False), (64, 48, 32, 32, True),
])
def test_what_is_large_enough_and_of_whole_steps_fits(rows, inputs, outputs, least, fits):
    assert inductor_fp8.fits(rows, inputs, outputs, least) == fits


def test_every_row_has_its_own_scale():
    sizes = torch.tensor([1e-6, 1, 1e6, 0, 1, 1])[:, None]
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * sizes
    x[4, 7] = 1e6  # an outlier costs the small values of its own row, and no other row
    q, scale = inductor_fp8.quantise(x)
    assert q.dtype == torch.float8_e4m3fn and scale.shape == (6, 1)
    back = q.double() * scale
    errors = (back - x).square().mean(-1).sqrt() / x.square().mean(-1).sqrt().clamp(min=1e-30)
    assert errors[3] == 0 and (errors[[0, 1, 2, 5]] < 2**-5).all()
    assert (q.float().abs().amax(-1)[[0, 1, 2, 4, 5]] == inductor_fp8.LARGEST).all()
    assert (back[4] - x[4]).abs().max() > 0.5


def exact(x, w):
    """The product of both as float8 holds them, in float64."""
    (qx, sx), (qw, sw) = inductor_fp8.quantise(x), inductor_fp8.quantise(w)
    return (qx.double() * sx) @ (qw.double() * sw).t()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_linear_layer_is_the_product_of_what_float8_holds(dtype):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(3, 16, 96, generator=rng).to(dtype)
    w = torch.randn(48, 96, generator=rng) * torch.linspace(0.01, 10, 48)[:, None]
    q, scale = inductor_fp8.quantise(w)
    got = inductor_fp8.linear(x, q, scale.t().contiguous())
    assert got.shape == (3, 16, 48) and got.dtype == torch.bfloat16
    expected = exact(x, w)
    assert ((got - expected).abs() <= 2**-8 * expected.abs() + 1e-5 * expected.abs().max()).all()  # rounded once
    assert not ((1.01 * got - expected).abs() <= 2**-8 * expected.abs() + 1e-5 * expected.abs().max()).all()
    true = x.double() @ w.double().t()
    assert 1e-2 < rel_rms(got.double().numpy(), true.numpy()) < 5e-2  # what three bits of mantissa give


@pytest.mark.parametrize("arch", ["sm_75", "sm_86"])
def test_older_gpus_are_refused(arch):
    with pytest.raises(EngineError, match=rf"option fp8: got linear on {arch}, expected sm_89 \(Ada\) or later.*leave"):
        check_fp8(arch)


@pytest.mark.parametrize("arch", ["sm_89", "sm_90", "sm_120"])
def test_newer_gpus_are_not(arch):
    check_fp8(arch)


def test_what_is_over_its_tolerance_is_not_published():
    truth = np.random.default_rng(0).standard_normal(1000)
    near, far = (compare.difference(truth * (1 + 1.1 * n * ENGINE_REL_RMS["fp8"]), truth) for n in (0.9, 1))
    compare.judge("x", near, "fp8", "engine")
    with pytest.raises(EngineError, match="expected at most 1e-01; leave --option fp8=linear out"):
        compare.judge("x", far, "fp8", "engine")


@pytest.fixture(scope="module")
def bundle(bundles, tmp_path_factory):
    """Of a tiny model; its keys and values of the text, one product of many weights, are built in float8."""
    bundle = Bundle.open(shutil.copytree(bundles["sd1"], tmp_path_factory.mktemp("fp8") / "sd1"))
    store.build(bundle, "unet_text", in_fp8(bundle))
    return bundle


def in_fp8(bundle, **rest):
    return config(bundle, "unet_text", **{"size": None, "options": FP8, **rest})


def test_an_engine_in_float8_says_so_and_is_held_to_it(bundle, monkeypatch):
    path = store.find(bundle, "unet_text", in_fp8(bundle))
    record = store.Record.read(path, "")
    assert ENGINE_REL_RMS["bf16"] / 10 < record.check.rel_rms < ENGINE_REL_RMS["fp8"]
    assert engines.backend("inductor").details(path)["sites"] == {"linear": {"fp8": 1}}
    assert compare.measure(bundle, "unet_text", record.config, path).precision == "fp8"
    monkeypatch.setitem(TOLERANCE, "fp8", record.check.rel_rms / 2)
    with pytest.raises(EngineError, match=r"engine of unet_text: .*; leave --option fp8=linear out"):
        compare.check(bundle, "unet_text", record.config, path)


def test_layers_that_are_too_small_leave_an_engine_as_it_was(bundle):
    """And held to the tolerance of its own dtype, which is what it says when none of its weights is in float8."""
    spec = bundle.component("unet_text")
    shapes = {name: (one.shape, one.dtype) for name, one in resolve(spec.inputs, in_fp8(bundle)).items()}
    graph = onnx_torch.rewrite(onnx_nodes.read(bundle.path / spec.file), True)
    found = onnx_torch.survey(graph, shapes, "fp32", frozenset())
    for least, dtypes in ((32, {"fp8"}), (33, {"fp32"}), (None, {"fp32"})):
        made = onnx_torch.build(found, "fp32", "cpu", None, least)
        assert {weight.dtype for weight in made.weights.values()} == dtypes


def test_new_weights_are_quantised_anew(bundle):
    """Of one part of the product, and back: the rows of the others, and their scales, stay as they are."""
    engine = store.load(bundle, "unet_text", in_fp8(bundle))
    reference = store.load(bundle, "unet_text", dataclasses.replace(
        in_fp8(bundle), backend="onnxruntime", options={}))
    feed = compare.inputs(engine.inputs.values(), 5)
    before = compare.run(engine, feed)
    file = bundle.path / bundle.component("unet_text").file
    graph = onnx_nodes.read(file)
    name = sorted(name for name in graph.values if graph.is_weight(name))[1]
    old = graph.numbers(name).copy()
    new = 50 * np.random.default_rng(0).standard_normal(old.shape).astype(np.float32)
    for each in (engine, reference):
        each.refit({name: new})
    after, expected = compare.run(engine, feed), compare.run(reference, feed)
    changed = {output for output in after if rel_rms(after[output], before[output]) > 2 * ENGINE_REL_RMS["fp8"]}
    assert len(changed) == 1 and len(after) > 4
    for output, value in after.items():
        assert rel_rms(value, expected[output]) < ENGINE_REL_RMS["fp8"]
        if output not in changed:
            np.testing.assert_array_equal(value, before[output])
    engine.refit({name: old})
    for output, value in compare.run(engine, feed).items():
        np.testing.assert_array_equal(value, before[output])


@pytest.mark.gpu
def test_on_a_gpu_that_multiplies_float8(bundle):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs an NVIDIA GPU of sm_89 or later")
    own = in_fp8(bundle, device="cuda:0", dtype="fp16",
                 options={"fp8": "linear", "fp8_least": "32", "max_autotune": "false"})
    check = store.Record.read(store.build(bundle, "unet_text", own), "").check
    assert check is not None and ENGINE_REL_RMS["fp16"] / 10 < check.rel_rms < ENGINE_REL_RMS["fp8"]
