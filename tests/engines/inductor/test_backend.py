"""The inductor backend: graphs become torch modules, and packages that open without a compiler and take new weights.

Builds compile C++, so that few are made: of the small bundle, and of the tiny text encoder for fused projections.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper as h
from onnx import numpy_helper

import engines
from engines import store
from engines.bundle import Bundle
from engines.check import compare
from engines.check.tolerance import TOLERANCE
from engines.inductor import nodes as onnx_nodes
from engines.inductor.backend import CONSTANTS, PACKAGE, RECORD
from engines.inductor.options import KERNELS, NATIVE
from engines.machine.buffers import resolve
from engines.spec import EngineConfig, EngineError
from kernels.cpu import library
from tests.engines.cases import bound, rel_rms, unet, weights
from tests.tolerances import ENGINE_REL_RMS, IMAGE_MAX
from tests.tools.small import small_bundle

torch = pytest.importorskip("torch")

from engines.inductor import module as onnx_torch  # noqa: E402

ROOT = Path(__file__).parents[3]
KERNELS_OF = {"fp32": {}, "bf16": {} if library.available() else dict.fromkeys(NATIVE, "latentrt")}
"""Options of the small UNet in each dtype: in fp32 both kernels are timed, in bf16 the C++ ones are asked for."""
module = engines.backend("inductor")
COMPONENTS = ["text_encoder", "unet", "vae_decoder", "vae_encoder"]


def config(bundle, component="unet", **rest):
    return bundle.config(component, backend="inductor", **{"size": (64, 64), "batch": 2, **rest})


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Takes the instruction sets that the CPU names for granted, which each build would try out for several seconds."""
    import torch._inductor.config as settings

    with settings.patch({"cpp.vec_isa_ok": True}):
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The small bundle with its UNet built in fp32 and, where this CPU has it, bf16, each with other kernels."""
    bundle = small_bundle(tmp_path_factory.mktemp("inductor") / "small")
    for dtype in module.dtypes():
        store.build(bundle, "unet", config(bundle, dtype=dtype, options=KERNELS_OF[dtype]))
    return bundle


@pytest.fixture(scope="module")
def text(bundles, tmp_path_factory):
    """A tiny text encoder, built."""
    bundle = Bundle.open(shutil.copytree(bundles["sd1"], tmp_path_factory.mktemp("inductor") / "sd1"))
    store.build(bundle, "text_encoder", config(bundle, "text_encoder"))
    return bundle


def torch_module(bundle, component, dtype, kernels=frozenset(), fuse=True, device="cpu"):
    """The module of a component with its weights, and the order of its inputs."""
    spec = bundle.component(component)
    graph = onnx_torch.rewrite(onnx_nodes.read(bundle.path / spec.file), fuse)
    inputs = resolve(spec.inputs, config(bundle, component))
    shapes = {name: (s.shape, s.dtype) for name, s in inputs.items()}
    return filled(onnx_torch.build(onnx_torch.survey(graph, shapes, dtype, kernels), dtype, device))


def filled(made):
    """The module with its weights in it."""
    for name, weight in made.weights.items():
        scales = getattr(made, onnx_torch.scales_name(name), None)
        for part in weight.names:
            weight.write(getattr(made, name), scales, part, torch.from_numpy(made.graph.numbers(part).copy()))
    return made


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize(("model", "kernels"), [("sd1", frozenset()), ("sd2", frozenset()),
                                                ("sd2", frozenset(KERNELS))],
                         ids=["sd1-torch", "sd2-torch", "sd2-latentrt"])
def test_every_graph_in_torch_equals_the_reference(bundles, model, component, dtype, kernels):
    """With our operators too, which on a CPU are their references: they are given what the sites mean."""
    bundle = Bundle.open(bundles[model])
    own = config(bundle, component)
    feed = compare.inputs(resolve(bundle.component(component).inputs, own).values(), 4)
    expected = compare.reference(bundle, component, own, feed)
    made = torch_module(bundle, component, dtype, kernels)
    with torch.no_grad():
        got = made(*(torch.from_numpy(feed[name]) for name in made.graph.inputs))
    for name, value in zip(made.graph.outputs, got, strict=True):
        assert value.dtype == torch.float32
        assert rel_rms(value.numpy(), expected[name]) < ENGINE_REL_RMS[dtype]
    counted = {site: sum(n for (op, _), n in made.used.items() if op == site) for site in KERNELS}
    sites = bundle.component(component).sites
    assert counted["attention"] == sites["Attention"]
    assert counted["group_norm"] == sites.get("GroupNormalization", 0)
    assert counted["layer_norm"] == sites.get("LayerNormalization", 0)
    assert counted["geglu"] == (sites["Gelu"] if component == "unet" else 0)
    if model == "sd2" and component == "unet":  # heads of 64: all are ours
        assert {whose for _, whose in made.used} == {"latentrt" if kernels else "torch"}


def test_the_pooled_text_of_xl_is_that_of_its_end(bundles):
    """Which is picked by its id, with operators that no other graph has."""
    bundle = Bundle.open(bundles["sdxl"])
    own = config(bundle, "text_encoder_2")
    feed = compare.inputs(resolve(bundle.component("text_encoder_2").inputs, own).values(), 4)
    feed["input_ids"][:, 9:], feed["placed"][:] = 527, -1
    expected = compare.reference(bundle, "text_encoder_2", own, feed)
    made = torch_module(bundle, "text_encoder_2", "fp32")
    with torch.no_grad():
        got = made(*(torch.from_numpy(feed[name]) for name in made.graph.inputs))
    for name, value in zip(made.graph.outputs, got, strict=True):
        assert rel_rms(value.numpy(), expected[name]) < ENGINE_REL_RMS["fp32"]


def test_projections_of_one_value_are_one_product(bundles):
    bundle = Bundle.open(bundles["sd1"])
    fused = torch_module(bundle, "unet", "fp32")
    apart = torch_module(bundle, "unet", "fp32", fuse=False)
    sizes = {weight.names for weight in fused.weights.values()}
    qkv = [tuple(f"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_{name}.weight" for name in "qkv")]
    assert set(qkv) <= sizes and len(fused.weights) < len(apart.weights)
    assert all(len(weight.names) == 1 for weight in apart.weights.values())
    assert sorted(n for w in fused.weights.values() for n in w.names) == sorted(
        n for w in apart.weights.values() for n in w.names)


@pytest.mark.parametrize("dtype", module.dtypes())
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
    found = module.details(path)
    assert {kind: sum(sites.values()) for kind, sites in found["sites"].items()} == {
        "attention": 1, "group_norm": 1, "layer_norm": 1}
    timed = {} if library.available() else dict.fromkeys(NATIVE, "auto")
    assert {kind: one["asked"] for kind, one in found["kernels"].items()} == dict.fromkeys(
        found["sites"], "torch") | timed
    assert {row["kind"] for row in found["timings"]} == set(timed) and not found["failed"]
    for row in found["timings"]:
        assert row["used"] == min(row["seconds"], key=row["seconds"].__getitem__)
        assert found["sites"][row["kind"]] == {row["used"]: row["sites"]}
        assert found["kernels"][row["kind"]]["used"] == row["used"]


@pytest.mark.skipif(bool(library.available()) or "bf16" not in module.dtypes(), reason="needs the C++ kernels and bf16")
def test_the_kernels_that_are_asked_for_are_used(small):
    found = module.details(store.find(small, "unet", config(small, dtype="bf16", options=KERNELS_OF["bf16"])))
    assert found["sites"] == {"attention": {"latentrt": 1}, "group_norm": {"latentrt": 1}, "layer_norm": {"torch": 1}}
    assert found["timings"] == [] and found["kernels"]["attention"] == {"asked": "latentrt", "used": "latentrt"}


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
        from engines import verify
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
    ({"options": {"surprise": "1"}}, "got option 'surprise', expected one of attention, group_norm"),
    ({"options": {"attention": "flash"}}, "option attention: got 'flash', expected latentrt, torch or auto"),
    ({"options": {"geglu": "latentrt"}}, "option geglu: got latentrt on cpu, expected torch"),
    ({"options": {"layer_norm": "auto"}}, "option layer_norm: got auto on cpu, expected torch: that kernel of ours is"),
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


def test_an_unknown_operator_is_named(tmp_path):
    nodes = [h.make_node("Det", ["x"], ["y"])]
    graph = graph_of(tmp_path / "x.onnx", nodes, {}, {"x": (2, 3, 3)})
    with pytest.raises(EngineError, match="got operator Det in the graph, expected one of Add"):
        onnx_torch.survey(graph, {"x": ((2, 3, 3), "float32")}, "fp32", frozenset())


def graph_of(path, nodes, initializers, inputs, outputs=("y",)):
    """What `onnx_nodes.read` makes of these nodes."""
    tensor = {name: h.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in inputs.items()}
    out = [h.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs]
    arrays = [numpy_helper.from_array(np.asarray(value), name) for name, value in initializers.items()]
    model = h.make_model(h.make_graph(nodes, "graph", list(tensor.values()), out, arrays),
                         opset_imports=[h.make_opsetid("", 23)], ir_version=11)
    onnx.save(model, path)
    return onnx_nodes.read(path)


NORM = h.make_node("GroupNormalization", ["x", "w", "b"], ["n"], num_groups=2)
SILU = [h.make_node("Sigmoid", ["n"], ["s"]), h.make_node("Mul", ["s", "n"], ["y"])]


@pytest.mark.parametrize(("after", "outputs", "fused"), [
    (SILU, ["y"], True), ([h.make_node("Mul", ["n", "n"], ["y"])], ["y"], False), (SILU, ["y", "n"], False),
    (SILU, ["y", "s"], False), ([*SILU, h.make_node("Neg", ["n"], ["z"])], ["y", "z"], False),
], ids=["silu", "square", "norm read", "sigmoid read", "norm used"])
def test_silu_joins_the_norm_that_nothing_else_reads(tmp_path, after, outputs, fused):
    ones = dict.fromkeys("wb", np.ones(4, np.float32))
    graph = onnx_nodes.silus(graph_of(tmp_path / "x.onnx", [NORM, *after], ones, {"x": (2, 4, 6)}, outputs))
    assert [n.op for n in graph.nodes if n.attributes.get("silu")] == ["GroupNormalization"] * fused
    assert len(graph.nodes) == (1 if fused else 1 + len(after))


@pytest.mark.parametrize(("approximate", "swap", "fused"), [("none", False, True), ("tanh", False, False),
                                                           ("none", True, False)], ids=["geglu", "tanh", "gate first"])
def test_geglu_is_exact_and_value_first(tmp_path, approximate, swap, fused):
    a, b = ("second", "first") if swap else ("first", "second")
    nodes = [h.make_node("Split", ["x"], [a, b], axis=-1, num_outputs=2),
             h.make_node("Gelu", ["second"], ["g"], approximate=approximate), h.make_node("Mul", ["g", "first"], ["y"])]
    ops = [n.op for n in onnx_nodes.geglus(graph_of(tmp_path / "x.onnx", nodes, {}, {"x": (2, 6)})).nodes]
    assert ops == (["Geglu"] if fused else ["Split", "Gelu", "Mul"])


@pytest.mark.parametrize(("sin_of", "found"), [("a", {"t", "f", "a", "y"}), ("m", set())], ids=["angles", "a layer"])
def test_angles_are_what_sines_are_computed_from(tmp_path, sin_of, found):
    nodes = [h.make_node("Mul", ["t", "f"], ["a"]), h.make_node("MatMul", ["a", "w"], ["m"]),
             h.make_node("Sin", [sin_of], ["y"])]
    initializers = {"f": np.ones(4, np.float32), "w": np.ones((4, 4), np.float32)}
    assert onnx_nodes.angles(graph_of(tmp_path / "x.onnx", nodes, initializers, {"t": (2, 1)})) == found


PADS = h.make_node("Conv", ["x", "w"], ["y"], pads=[0, 1, 2, 0], strides=[2, 1], kernel_shape=[3, 2])
RESIZES = {"asymmetric": {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}, "default": {}}


@pytest.mark.parametrize("nodes", [
    [PADS], [h.make_node("Resize", ["x", "", "twice"], ["y"], **RESIZES["asymmetric"])],
    [h.make_node("Resize", ["x", "", "twice"], ["y"])],
    [h.make_node("Slice", ["x", "one", "many", "one", "two"], ["y"])],
    [h.make_node("Gather", ["x", "index"], ["y"], axis=2)], [h.make_node("Gather", ["x", "scalar"], ["y"], axis=1)],
    [h.make_node("Shape", ["x"], ["s"], start=2), h.make_node("Concat", ["minus", "s"], ["c"], axis=0),
     h.make_node("Reshape", ["x", "c"], ["y"])],
    [h.make_node("Attention", ["x", "x", "x", "causal"], ["y"])],
    [h.make_node("Attention", ["x", "x", "x", "mask"], ["y"])],
    [h.make_node("Attention", ["x", "x", "x"], ["y"], is_causal=1, scale=0.3)],
    [h.make_node("Transpose", ["g"], ["gt"], perm=[1, 0]), h.make_node("MatMul", ["x", "gt"], ["m"]),
     h.make_node("Add", ["bias", "m"], ["y"])],
    [h.make_node("Clip", ["x", "low"], ["y"])], [h.make_node("Conv", ["x", "w1", "b1"], ["y"])],
    [h.make_node("ConvTranspose", ["x", "wt", "b1"], ["y"], pads=[1, 0, 1, 0], strides=[2, 3], output_padding=[1, 0])],
    [h.make_node("Pad", ["x", "around"], ["y"])], [h.make_node("ReduceSum", ["x", "one"], ["y"], keepdims=0)],
    [h.make_node("Relu", ["x"], ["y"])],
    [h.make_node("ArgMin", ["x"], ["i"], axis=2, keepdims=0), h.make_node("Cast", ["i"], ["y"], to=1)],
    [h.make_node("Cast", ["x"], ["whole"], to=7), h.make_node("Equal", ["whole", "scalar"], ["e"]),
     h.make_node("Cast", ["e"], ["n"], to=6), h.make_node("ArgMax", ["n"], ["i"], axis=3, keepdims=0),
     h.make_node("Range", ["nought", "six", "scalar"], ["r"]), h.make_node("Max", ["i", "r"], ["m"]),
     h.make_node("Unsqueeze", ["m", "last"], ["u"]), h.make_node("GatherND", ["bias", "u"], ["y"])],
], ids=["pads", "resize", "resize half_pixel", "slice", "gather", "gather one", "reshape", "causal mask", "mask",
        "causal", "linear", "clip", "one channel", "transposed", "zeros", "sum", "relu", "argmin", "pick"])
def test_operators_equal_onnxruntime(tmp_path, nodes):
    import onnxruntime

    rng = np.random.default_rng(0)
    initializers = {
        "w": rng.standard_normal((5, 4, 3, 2)).astype(np.float32), "twice": np.float32([1, 1, 2, 3]),
        "one": np.int64([1]), "two": np.int64([2]), "many": np.int64([2**62]), "index": np.int64([[0, 5], [2, 2]]),
        "scalar": np.int64(1), "nought": np.int64(0), "six": np.int64(6), "last": np.int64([3]),
        "minus": np.int64([2, -1]), "causal": np.tri(6, dtype=bool)[None, None],
        "mask": rng.random((6, 6)) < 0.7, "g": rng.standard_normal((7, 6)).astype(np.float32),
        "w1": rng.standard_normal((1, 4, 3, 2)).astype(np.float32),
        "wt": rng.standard_normal((4, 1, 3, 2)).astype(np.float32), "b1": np.float32([0.3]),
        "around": np.int64([0, 0, 1, 0, 0, 0, 2, 3]), "bias": rng.standard_normal(7).astype(np.float32),
        "low": np.float32(-0.5)}
    used = {name for node in nodes for name in node.input}
    initializers = {name: value for name, value in initializers.items() if name in used}
    graph = graph_of(tmp_path / "x.onnx", nodes, initializers, {"x": (2, 4, 6, 6)})
    x = rng.standard_normal((2, 4, 6, 6)).astype(np.float32)
    expected = onnxruntime.InferenceSession(tmp_path / "x.onnx").run(None, {"x": x})[0]
    found = onnx_torch.survey(onnx_torch.rewrite(graph, True), {"x": (x.shape, "float32")}, "fp32", frozenset())
    made = filled(onnx_torch.build(found, "fp32", "cpu"))
    np.testing.assert_allclose(made(torch.from_numpy(x))[0].numpy(), expected, rtol=1e-5, atol=1e-5)


def test_a_gpu_graph_holds_our_kernels(bundles):
    """Traced for a GPU that is not here: torch.export sees our operators at every site, its compiler their kernels."""
    code = textwrap.dedent(f"""
        import json
        from collections import Counter
        import torch
        import triton
        from torch._functorch.aot_autograd import aot_export_module
        from torch._subclasses.fake_tensor import FakeTensorMode
        from engines import Bundle, onnx_nodes, onnx_torch
        from engines.machine.buffers import resolve
        from engines.inductor.options import KERNELS

        class Hopper:
            get_current_target = staticmethod(lambda: triton.backends.compiler.GPUTarget("cuda", 90, 32))

        # A PyTorch without CUDA refuses to ask the device, and this method of its tensors.
        torch.cuda.get_device_capability = lambda device=None: (9, 0)
        torch.Tensor.contiguous = lambda x, memory_format=torch.contiguous_format: torch.ops.aten.contiguous(
            x, memory_format=memory_format)
        bundle = Bundle.open({str(bundles["sd2"])!r})
        spec = bundle.component("unet")
        inputs = resolve(spec.inputs, bundle.config("unet", backend="inductor", size=(64, 64), batch=2))
        graph = onnx_torch.rewrite(onnx_nodes.read(bundle.path / spec.file), True)
        with FakeTensorMode(), torch.no_grad():
            shapes = {{n: (s.shape, s.dtype) for n, s in inputs.items()}}
            found = onnx_torch.survey(graph, shapes, "fp16", frozenset(KERNELS))
            module = onnx_torch.build(found, "fp16", "cuda:0", fp8_least=32)
            x = tuple(torch.zeros(inputs[n].shape, device="cuda:0") for n in graph.inputs)
            program = torch.export.export(module, x, strict=False)
            ops = Counter(str(node.target) for node in program.graph.nodes if "latentrt" in str(node.target))
            triton.runtime.driver.set_active(Hopper())
            traced, _ = aot_export_module(program.module(), x, trace_joint=False, decompositions={{}})
        kernels = [node for node in traced.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
        products = sum("_scaled_mm" in str(node.target) for node in traced.graph.nodes)
        print(json.dumps([products, module.used["linear", "fp8"], ops,
                          [node.kwargs["tensors_to_clone"] for node in kernels],
                          [str(node.target) for node in traced.graph.nodes if "latentrt" in str(node.target)]]))
    """)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    products, in_fp8, ops, written, left = json.loads(done.stdout)
    assert products == in_fp8 > 10
    sites = Bundle.open(bundles["sd2"]).component("unet").sites
    assert ops == {"latentrt.attention.default": sites["Attention"], "latentrt.geglu.default": sites["Gelu"],
                   "latentrt.group_norm.default": sites["GroupNormalization"],
                   "latentrt.layer_norm.default": sites["LayerNormalization"]}
    assert left == [] and len(written) >= sum(ops.values())
    assert {name for names in written for name in names} <= {"out_ptr", "parts_ptr"}  # nothing else is thought written


@pytest.mark.slow
def test_a_pipeline_draws_the_reference_picture(bundles, tmp_path):
    """All engines of a tiny model; and a bias of four values, which a compiler would make a literal, is refitted.

    Quick, as compiling goes: one level each, and the refitted engine is the picture's.
    """
    from runtime import Pipeline, Request

    bundle = Bundle.open(shutil.copytree(bundles["sd1_one_level"], tmp_path / "bundle"))
    request = Request("a cat and a horse", steps=3, seed=5, size=(16, 16), scheduler="ddim")
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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_equals_the_reference_on_a_gpu(tmp_path, dtype):
    bundle = small_bundle(tmp_path / "small")
    own = config(bundle, device="cuda:0", dtype=dtype, options={"max_autotune": "false"})
    check = store.Record.read(store.build(bundle, "unet", own), "").check
    assert check is not None and 0 < check.rel_rms < TOLERANCE[dtype]


@pytest.mark.gpu
def test_a_captured_run_sees_new_inputs_and_new_weights(tmp_path):
    bundle = small_bundle(tmp_path / "small")
    engine = store.load(bundle, "unet", config(bundle, device="cuda:0", options={"max_autotune": "false"}))
    specs = {**engine.inputs, **engine.outputs}
    buffers = {n: torch.zeros(s.shape, dtype=getattr(torch, s.dtype), device="cuda:0") for n, s in specs.items()}
    engine.bind(buffers)
    engine.enqueue()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        engine.enqueue(torch.cuda.current_stream().cuda_stream)
    feed = compare.inputs(engine.inputs.values(), 3)
    other = torch.full((2**22,), float("nan"), device="cuda:0")  # what else is allocated is not the graph's memory
    for name, value in feed.items():
        buffers[name].copy_(torch.from_numpy(value))
    graph.replay()
    torch.cuda.synchronize()
    old = weights(bundle)
    assert rel_rms(buffers["noise_pred"].cpu().numpy(), unet(old, feed)) < ENGINE_REL_RMS["fp32"]
    changed = {"conv_in.weight": old["conv_in.weight"] * 1.5}
    engine.refit({name: value.astype(np.float32) for name, value in changed.items()})
    graph.replay()
    torch.cuda.synchronize()
    assert rel_rms(buffers["noise_pred"].cpu().numpy(), unet({**old, **changed}, feed)) < ENGINE_REL_RMS["fp32"]
    assert other.isnan().all()


def test_versions_name_the_device():
    """And the C++ kernels, where an engine may hold calls of them."""
    named = {"inductor", "cpu", "arch", "isa"}
    assert set(module.versions(EngineConfig("inductor"))) == named | (set() if library.available() else {"kernels"})
    own = EngineConfig("inductor", options=dict.fromkeys(NATIVE, "torch"))
    assert set(module.versions(own)) == named
    assert module.versions()["inductor"].startswith(torch.__version__.partition("+")[0])
