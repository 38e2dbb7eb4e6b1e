"""Patterns that the passes of several backends look for: each is found, and what only looks like it is not."""

import numpy as np
import onnx_ir as ir
import pytest

from engines.onnx import patterns


def value(name="x", kind=ir.DataType.FLOAT, shape=(2, 3)):
    return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))


def initializer(array, name="w"):
    stored = value(name, ir.DataType.from_numpy(np.asarray(array).dtype), np.shape(array))
    stored.const_value = ir.tensor(array, name=name)
    return stored


def op(kind, *inputs, domain="", outputs=1, **attributes):
    node = ir.node(kind, list(inputs), attributes, domain=domain, num_outputs=outputs)
    for n, out in enumerate(node.outputs):
        out.name = f"{kind}{id(node)}_{n}"
    return node


def graph(inputs, outputs, nodes, initializers=()):
    return ir.Graph(inputs, outputs, nodes=nodes, initializers=initializers, opset_imports={"": 24})


def silu_graph(form, **others):
    """SiLU of the output of a Relu, and what `others` asks for beside it; returns (its end, what patterns find)."""
    start = op("Relu", value())
    x = start.outputs[0]
    if form == "swish":
        end = op("Swish", x, **others.get("swish", {}))
        nodes = [start, end]
    else:
        gate = op("Sigmoid", x, domain=others.get("domain", ""))
        left, right = (gate.outputs[0], x) if form == "gate first" else (x, gate.outputs[0])
        end = op("Mul", left, right)
        nodes = [start, gate, end]
    outputs = [end.outputs[0]]
    if "reader" in others:
        nodes.append(op("Neg", x if others["reader"] == "x" else gate.outputs[0]))
        outputs.append(nodes[-1].outputs[0])
    if "output" in others:
        outputs.append(x if others["output"] == "x" else gate.outputs[0])
    keep = graph([start.inputs[0]], outputs, nodes)
    return end, patterns.silu(x), keep


@pytest.mark.parametrize("form", ["value first", "gate first", "swish"])
def test_silu_is_found_in_each_form(form):
    end, found, _ = silu_graph(form)
    assert found is end


@pytest.mark.parametrize(("form", "others"), [
    ("swish", {"swish": {"alpha": 2.0}}), ("swish", {"reader": "x"}), ("swish", {"output": "x"}),
    ("value first", {"reader": "x"}), ("value first", {"output": "x"}), ("value first", {"reader": "gate"}),
    ("value first", {"output": "gate"}), ("value first", {"domain": "other"}),
], ids=str)
def test_what_is_no_silu_or_is_read_elsewhere_is_left(form, others):
    assert silu_graph(form, **others)[1] is None


def test_a_square_of_sigmoids_is_no_silu():
    start = op("Relu", value())
    gate = op("Sigmoid", start.outputs[0])
    square = op("Mul", gate.outputs[0], gate.outputs[0])
    end = op("Add", square.outputs[0], start.outputs[0])
    keep = graph([start.inputs[0]], end.outputs, [start, gate, square, end])
    assert patterns.silu(start.outputs[0]) is None and keep


def test_the_only_user_reads_it_once():
    first, x = op("Relu", value()), value("y")
    twice = op("Mul", x, x)
    keep = graph([first.inputs[0], x], twice.outputs, [first, twice])
    assert patterns.only_user(x) is None and patterns.only_user(twice.outputs[0]) is None
    assert patterns.only_user(first.inputs[0]) is first and keep
    assert patterns.only_user(first.inputs[0], "Relu") is first and patterns.only_user(first.inputs[0], "Neg") is None
    other = op("Relu", value("z"), domain="other")
    assert patterns.only_user(other.inputs[0]) is other and patterns.only_user(other.inputs[0], "Relu") is None


@pytest.mark.parametrize(("perm", "swap"), [((0, 2, 1, 3), True), ((0, 2, 3, 1), False), (None, False)], ids=str)
def test_the_swap_of_tokens_and_heads(perm, swap):
    given = {} if perm is None else {"perm": perm}
    assert patterns.is_swap(op("Transpose", value(shape=(1, 2, 3, 4)), **given)) == swap
    assert not patterns.is_swap(op("Transpose", value(), domain="other", **given)) and not patterns.is_swap(None)


@pytest.mark.parametrize(("chain", "transposed"), [
    ([], False), ([("Cast", {"to": 1})], False), ([("Transpose", {"perm": (1, 0)})], True), ([("Transpose", {})], True),
    ([("Transpose", {"perm": (0, 1)})], False), ([("Transpose", {}), ("Cast", {"to": 1})], True),
    ([("Cast", {"to": 1}), ("Transpose", {}), ("Transpose", {"perm": (1, 0)})], False),
], ids=str)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_stored_weight_behind_casts_and_transposes(chain, transposed, dtype):
    weight = initializer(np.ones((2, 3), dtype))
    nodes, read = [], weight
    for kind, given in chain:
        nodes.append(op(kind, read, **given))
        read = nodes[-1].outputs[0]
    end = op("MatMul", value(), read)
    keep = graph([end.inputs[0]], end.outputs, [*nodes, end], [weight])
    assert patterns.stored(end.inputs[1]) == (weight, transposed) and keep


def test_what_is_computed_or_no_number_of_floating_point_is_not_stored():
    whole, weight = initializer(np.ones(3, np.int64), "n"), initializer(np.ones(3, np.float32))
    cast, neg = op("Cast", whole, to=1), op("Neg", weight)
    keep = graph([], [cast.outputs[0], neg.outputs[0]], [cast, neg], [whole, weight])
    assert [patterns.stored(v) for v in (cast.outputs[0], neg.outputs[0], value(), None)] == [None] * 4 and keep


def test_attributes_and_arguments_that_a_node_leaves_out():
    node = op("Clip", value(), None, value("high"), alpha=0.5)
    assert patterns.attribute(node, "alpha") == 0.5 and patterns.attribute(node, "beta", 2) == 2
    assert patterns.attributes(node) == {"alpha": 0.5}
    assert [patterns.argument(node, at) for at in range(4)] == [*node.inputs, None] and node.inputs[1] is None


def test_shapes_and_types_that_are_not_known():
    assert patterns.shape(value(shape=(2, 3))) == (2, 3)
    assert patterns.shape(value(shape=(2, "n"))) == patterns.shape(ir.Value(name="x")) == patterns.shape(None) == ()
    kinds = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.INT64)
    assert [patterns.dtype(value(kind=kind)) for kind in kinds] == ["fp16", "bf16", "fp32", "unknown"]
    assert patterns.dtype(ir.Value(name="x")) == "unknown" and not patterns.is_float(ir.Value(name="x"))
