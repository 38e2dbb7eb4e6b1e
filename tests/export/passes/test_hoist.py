"""Step-invariant code motion: the parts together are the whole, and nothing invariant is left in the step."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from engines import Bundle, store
from engines.onnxruntime import backend
from engines.spec import TensorSpec
from export import ExportError
from export.families.unet import CUTS
from export.passes.hoist import hoist
from runtime import Pipeline, Request
from tests.tolerances import EXPORT_REL_RMS, IMAGE_MAX
from tests.tools.graphs import run

PARTS = ["unet_text", "unet_time", "unet_body"]
INVARIANT = {cut.part: cut.reads for cut in CUTS}


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def bundle(request, bundles) -> Bundle:
    return Bundle.open(bundles[request.param])


@pytest.mark.parametrize("rows, height, width, tokens", [(2, 8, 8, 77), (3, 16, 8, 20)])
def test_parts_are_the_whole(bundle, rows, height, width, tokens):
    rng = np.random.default_rng(0)
    text = bundle.component("unet").inputs[2].shape[2]
    feed = {"sample": rng.standard_normal((rows, 4, height, width), np.float32),
            "timestep": rng.uniform(0, 1000, rows).astype(np.float32),
            "encoder_hidden_states": rng.standard_normal((rows, tokens, text), np.float32)}
    expected = run(bundle.path / "unet.onnx", feed)["noise_pred"]
    handed = {}
    for part in PARTS[:2]:
        handed |= run(bundle.path / f"{part}.onnx", feed)
    got = run(bundle.path / "unet_body.onnx", {"sample": feed["sample"], **handed})["noise_pred"]
    assert np.abs(got - expected).max() <= EXPORT_REL_RMS["fp32"] * np.abs(expected).max()


def test_manifest_and_graphs_say_the_same(bundle):
    components = bundle.manifest.components
    assert [name for name, c in bundle.graphs("unet").items() if c.part and not c.variant] == PARTS
    for name in PARTS:
        graph = ir.load(bundle.path / f"{name}.onnx").graph
        for values, specs in ((graph.inputs, components[name].inputs), (graph.outputs, components[name].outputs)):
            assert [(v.name, tuple(d if isinstance(d, int) else d.value for d in v.shape)) for v in values] == [
                (spec.name, spec.shape) for spec in specs]
    handed = {spec for name in PARTS[:2] for spec in components[name].outputs}
    assert set(components["unet_body"].inputs) == {components["unet"].inputs[0], *handed}


def test_nothing_invariant_is_left(bundle):
    """Keys and values of every cross-attention, the time MLP and a projection for every resnet have left the body."""
    parts = {name: ir.load(bundle.path / f"{name}.onnx").graph for name in ("unet", *PARTS)}
    names = {name: set(graph.initializers) for name, graph in parts.items()}
    text = {n for n in names["unet"] if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    time = {n for n in names["unet"] if "time_emb" in n}
    assert text and time
    assert text <= names["unet_text"] and not text & names["unet_body"]
    assert time <= names["unet_time"] and not time & names["unet_body"]
    weights = {n for n in names["unet"] if n.endswith((".weight", ".bias"))}
    assert {n for n in names["unet_body"] if n.endswith((".weight", ".bias"))} == weights - text - time
    assert not {"Sin", "Cos"} & {node.op_type for node in parts["unet_body"]}
    assert {n.removesuffix(".weight") for n in text} == {value.name for value in parts["unet_text"].outputs}


def test_parts_share_the_weights_file(bundle):
    for name in PARTS:
        assert set(bundle.component(name).files) == {f"{name}.onnx", "unet.onnx.data"}
        assert (bundle.path / f"{name}.onnx").stat().st_size < 300_000


def model_of(nodes: list[ir.Node], inputs: list[ir.Value]) -> ir.Model:
    graph = ir.Graph(inputs, [nodes[-1].outputs[0]], nodes=nodes, opset_imports={"": 23}, name="unet")
    return ir.Model(graph, ir_version=10)


def value(name: str, shape: tuple[int | str | None, ...]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))


def test_what_depends_on_text_and_time_stays(tmp_path):
    """x + relu(exp(text) · exp(time)): the exponentials go, their product stays, in graphs that still compute it."""
    inputs = [value(name, ("batch", 4)) for name in ("sample", "text", "time")]
    exponents = [ir.node("Exp", [v]) for v in inputs[1:]]
    both = ir.node("Mul", [node.outputs[0] for node in exponents])
    nodes = [*exponents, both, relu := ir.node("Relu", [both.outputs[0]]),
             ir.node("Add", [inputs[0], relu.outputs[0]])]
    for n, node in enumerate(nodes):
        node.outputs[0].name, node.outputs[0].dtype = f"value{n}", ir.DataType.FLOAT
    specs = [TensorSpec(str(v.name), "float32", ("batch", 4)) for v in inputs]
    model = model_of(nodes, inputs)
    ir.save(model, file := tmp_path / "unet.onnx")
    parts = hoist(model, {"text": ["text"], "time": ["time"]}, specs, [TensorSpec("value4", "float32", ("batch", 4))])
    assert list(parts) == ["text", "time", "body"]
    assert [node.op_type for node in parts["body"].model.graph] == ["Mul", "Relu", "Add"]
    for name, part in parts.items():
        ir.save(part.model, tmp_path / f"unet_{name}.onnx")
    feed = {spec.name: np.random.default_rng(n).standard_normal((2, 4), np.float32) for n, spec in enumerate(specs)}
    handed = run(tmp_path / "unet_text.onnx", feed) | run(tmp_path / "unet_time.onnx", feed)
    got = run(tmp_path / "unet_body.onnx", feed | handed)["value4"]
    np.testing.assert_array_equal(got, run(file, feed)["value4"])


def test_model_without_invariants_is_left_whole():
    inputs = [value("sample", ("batch", 4)), value("text", ("batch", 4))]
    node = ir.node("Add", inputs)
    node.outputs[0].name = "out"
    *specs, out = [TensorSpec(name, "float32", ("batch", 4)) for name in ("sample", "text", "out")]
    assert hoist(model_of([node], inputs), {"text": ["text"]}, specs, [out]) == {}


def test_unknown_shape_is_an_error():
    """How many values of the text are not zero is known only at run time."""
    inputs = [value("sample", ("batch", 4)), value("text", ("batch", 4))]
    where = ir.node("NonZero", [inputs[1]])
    wide = ir.node("Cast", [where.outputs[0]], {"to": ir.DataType.FLOAT})
    sine = ir.node("Sin", [wide.outputs[0]])
    nodes = [where, wide, sine, ir.node("Add", [inputs[0], sine.outputs[0]])]
    for n, node in enumerate(nodes):
        node.outputs[0].name, node.outputs[0].dtype = f"value{n}", ir.DataType.FLOAT if n else ir.DataType.INT64
    specs = [TensorSpec(str(v.name), "float32", ("batch", 4)) for v in inputs]
    with pytest.raises(ExportError, match=r"value2: got dimensions .* expected those of the inputs"):
        hoist(model_of(nodes, inputs), {"text": ["text"]}, specs, [TensorSpec("value3", "float32", ("batch", 4))])


def test_pictures_are_the_same_whole_and_in_parts(bundle, monkeypatch):
    """More steps than an engine of unet_time takes at once, and a batch of requests of several lengths."""
    requests = [Request("a cat", steps=steps, seed=steps, height=64, width=64, guidance=guidance)
                for steps, guidance in ((2, 7.5), (35, 1.0), (3, 3.0))]
    pictures = []
    for parts in (True, False):
        monkeypatch.setattr(backend.ONNXRUNTIME, "in_parts", parts)
        assert store.in_parts(bundle, "onnxruntime") == parts
        assert ("unet" in store.used(bundle, "onnxruntime")) != parts
        pipe = Pipeline.load(bundle.path, "onnxruntime", size=(64, 64), batch=2)
        pictures.append(np.concatenate([pipe.decode(result.latents) for result in pipe(requests)]))
    np.testing.assert_allclose(*pictures, atol=IMAGE_MAX, rtol=0)


def test_the_same_graph_gives_the_same_parts(bundle, tmp_path):
    component = bundle.component("unet")
    parts = hoist(ir.load(bundle.path / "unet.onnx"), INVARIANT, component.inputs, component.outputs)
    assert [f"unet_{name}" for name in parts] == PARTS
    for name, part in parts.items():
        ir.save(part.model, tmp_path / f"unet_{name}.onnx")
        assert (tmp_path / f"unet_{name}.onnx").read_bytes() == (bundle.path / f"unet_{name}.onnx").read_bytes()


def test_parts_that_compute_something_else_are_an_error(bundle, monkeypatch):
    """As they would if a node were lost on the way."""
    component = bundle.component("unet")
    extract = ir.convenience.extract

    def forgetful(graph, inputs, outputs):
        part = extract(graph, inputs, outputs)
        if lost := next((node for node in part if node.op_type == "Sigmoid"), None):
            ir.convenience.replace_all_uses_with(lost.outputs[0], lost.inputs[0])
            part.remove(lost, safe=True)
        return part

    monkeypatch.setattr(ir.convenience, "extract", forgetful)
    with pytest.raises(ExportError, match=r"unet: its parts have \d+ nodes that compute something, expected the \d+"):
        hoist(ir.load(bundle.path / "unet.onnx"), INVARIANT, component.inputs, component.outputs)
