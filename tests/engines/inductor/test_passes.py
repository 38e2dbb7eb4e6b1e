"""The rewrites of a graph before PyTorch traces it: what each makes of its pattern, and what it leaves alone."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper as h

from engines.backend import Target
from engines.bundle import Bundle
from engines.inductor import passes
from tests.engines.inductor.graphs import config, proto
from tests.tools.torch_modules import shapes_of, torch_module

NORM = h.make_node("GroupNormalization", ["x", "w", "b"], ["n"], num_groups=2)
SILU = [h.make_node("Sigmoid", ["n"], ["s"]), h.make_node("Mul", ["s", "n"], ["y"])]
SWISH = [h.make_node("Swish", ["n"], ["y"])]


def model_of(nodes, initializers, inputs, outputs=("y",)):
    return ir.from_proto(proto(nodes, initializers, inputs, outputs))


def changes_once(rewrite, model):
    """Whether it changed something; that it does not do so again, and that every name of the graph's ends is kept."""
    ends = [[value.name for value in values] for values in (model.graph.inputs, model.graph.outputs)]
    modified = rewrite(model).modified
    assert not rewrite(model).modified
    assert [[value.name for value in values] for values in (model.graph.inputs, model.graph.outputs)] == ends
    return modified


def ops(model):
    return [f"{node.domain}::{node.op_type}".removeprefix("::") for node in model.graph]


@pytest.mark.parametrize(("after", "outputs", "fused"), [
    (SILU, ["y"], True), (SWISH, ["y"], True), ([h.make_node("Mul", ["n", "n"], ["y"])], ["y"], False),
    (SILU, ["y", "n"], False), (SILU, ["y", "s"], False),
    ([*SILU, h.make_node("Neg", ["n"], ["z"])], ["y", "z"], False),
], ids=["silu", "swish", "square", "norm read", "sigmoid read", "norm used"])
def test_silu_joins_the_norm_that_nothing_else_reads(after, outputs, fused):
    ones = dict.fromkeys("wb", np.ones(4, np.float32))
    model = model_of([NORM, *after], ones, {"x": (2, 4, 6)}, outputs)
    assert changes_once(passes.Silus(), model) == fused
    assert ops(model) == (["latentrt::GroupNormSilu"] if fused else ["GroupNormalization", *(n.op_type for n in after)])
    node = model.graph[0]
    assert (node.attributes["num_groups"].value, len(node.inputs)) == (2, 3)


@pytest.mark.parametrize(("approximate", "swap", "fused"), [("none", False, True), ("tanh", False, False),
                                                           ("none", True, False)], ids=["geglu", "tanh", "gate first"])
def test_geglu_is_exact_and_value_first(approximate, swap, fused):
    a, b = ("second", "first") if swap else ("first", "second")
    nodes = [h.make_node("Split", ["x"], [a, b], axis=-1, num_outputs=2),
             h.make_node("Gelu", ["second"], ["g"], approximate=approximate), h.make_node("Mul", ["g", "first"], ["y"])]
    model = model_of(nodes, {}, {"x": (2, 6)})
    assert changes_once(passes.Geglus(), model) == fused
    assert ops(model) == (["latentrt::Geglu"] if fused else ["Split", "Gelu", "Mul"])
    assert not fused or model.graph[0].attributes["axis"].value == -1


WEIGHTS = {"w": np.ones((3, 4), np.float32), "b": np.ones(3, np.float32), "one": np.ones(1, np.float32)}
TURNED = h.make_node("Transpose", ["w"], ["t"], perm=[1, 0])


@pytest.mark.parametrize(("nodes", "inputs"), [
    ([TURNED, h.make_node("MatMul", ["x", "t"], ["m"]), h.make_node("Add", ["m", "b"], ["y"])], ["x", "w", "b"]),
    ([TURNED, h.make_node("MatMul", ["x", "t"], ["m"]), h.make_node("Add", ["b", "m"], ["y"])], ["x", "w", "b"]),
    ([TURNED, h.make_node("MatMul", ["x", "t"], ["y"])], ["x", "w"]),
    ([h.make_node("Cast", ["w"], ["c"], to=1), h.make_node("Transpose", ["c"], ["t"]),
      h.make_node("MatMul", ["x", "t"], ["y"])], ["x", "w"]),
    ([h.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)], ["x", "w", "b"]),
    ([h.make_node("Gemm", ["x", "w"], ["y"], transB=1)], ["x", "w"]),
], ids=["bias", "bias first", "no bias", "cast", "gemm", "gemm without bias"])
def test_a_product_with_a_stored_weight_is_a_linear(nodes, inputs):
    model = model_of(nodes, WEIGHTS, {"x": (2, 4)})
    assert changes_once(lambda model: ir.passes.PassResult(model, passes.rewrite(model, False)), model)
    assert ops(model) == ["latentrt::Linear"]
    assert [value.name for value in model.graph[0].inputs] == inputs


@pytest.mark.parametrize(("nodes", "outputs", "left"), [
    ([h.make_node("MatMul", ["x", "g"], ["y"])], ["y"], ["MatMul"]),
    ([h.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1, alpha=2.0)], ["y"], ["Gemm"]),
    ([h.make_node("Gemm", ["x", "g", "b"], ["y"])], ["y"], ["Gemm"]),
    ([h.make_node("Gemm", ["x", "w", "one"], ["y"], transB=1)], ["y"], ["Gemm"]),
    ([TURNED, h.make_node("MatMul", ["x", "t"], ["m"]), h.make_node("Add", ["m", "one"], ["y"])], ["y"],
     ["Transpose", "latentrt::Linear", "Add"]),
    ([TURNED, h.make_node("MatMul", ["x", "t"], ["m"]), h.make_node("Add", ["m", "b"], ["y"])], ["y", "m"],
     ["Transpose", "latentrt::Linear", "Add"]),
], ids=["not transposed", "scaled", "gemm not transposed", "one bias for all", "a number is added", "product read"])
def test_what_pytorch_has_no_linear_layer_for_is_left(nodes, outputs, left):
    model = model_of(nodes, {**WEIGHTS, "g": np.ones((4, 3), np.float32)}, {"x": (2, 4)}, outputs)
    changes_once(passes.Linears(), model)
    assert ops(model) == left


def test_products_of_one_value_are_merged_where_they_all_have_a_bias_or_none_has():
    weights = {f"w{n}": np.ones((n + 1, 4), np.float32) for n in range(1, 6)} | {
        f"b{n}": np.ones(n + 1, np.float32) for n in (1, 3)}
    nodes = [h.make_node("Gemm", ["x", f"w{n}", *([f"b{n}"] if n in (1, 3) else [])], [f"y{n}"], transB=1)
             for n in range(1, 5)]
    nodes += [h.make_node("Relu", ["x"], ["r"]), h.make_node("Gemm", ["r", "w5"], ["y5"], transB=1)]
    model = model_of(nodes, weights, {"x": (2, 4)}, [f"y{n}" for n in range(1, 6)])
    passes.Linears()(model)
    assert changes_once(passes.MergeLinears(), model)
    inputs = [["x", "w1", "w3", "b1", "b3"], ["x", "w2", "w4"], ["x"], ["r", "w5"]]
    assert [[value.name for value in node.inputs] for node in model.graph] == inputs
    outputs = [["y1", "y3"], ["y2", "y4"], ["r"], ["y5"]]
    assert [[value.name for value in node.outputs] for node in model.graph] == outputs


@pytest.mark.parametrize(("sin_of", "found"), [("a", {"t", "f", "a", "y"}), ("m", set())], ids=["angles", "a layer"])
def test_angles_are_what_sines_are_computed_from(sin_of, found):
    nodes = [h.make_node("Mul", ["t", "f"], ["a"]), h.make_node("MatMul", ["a", "w"], ["m"]),
             h.make_node("Sin", [sin_of], ["y"])]
    initializers = {"f": np.ones(4, np.float32), "w": np.ones((4, 4), np.float32)}
    model = model_of(nodes, initializers, {"t": (2, 1)})
    assert {value.name for value in passes.angles(model.graph)} == found


@pytest.mark.parametrize("component", ["unet", "text_encoder", "vae_decoder"])
def test_a_second_run_changes_nothing(bundles, component):
    bundle = Bundle.open(bundles["sd1"])
    model = passes.read(bundle.path / bundle.component(component).file)
    assert passes.rewrite(model, True) and not passes.rewrite(model, True)
    assert {node.domain for node in model.graph} == {"", passes.DOMAIN}


def test_projections_of_one_value_are_one_product(bundles):
    bundle = Bundle.open(bundles["sd1"])
    target = Target.of(bundle, "unet", config(bundle))
    fused, apart = (torch_module(target.onnx, shapes_of(target), fuse=fuse) for fuse in (True, False))
    sizes = {weight.names for weight in fused.weights.values()}
    qkv = [tuple(f"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_{name}.weight" for name in "qkv")]
    assert set(qkv) <= sizes and len(fused.weights) < len(apart.weights)
    assert all(len(weight.names) == 1 for weight in apart.weights.values())
    assert sorted(n for w in fused.weights.values() for n in w.names) == sorted(
        n for w in apart.weights.values() for n in w.names)
