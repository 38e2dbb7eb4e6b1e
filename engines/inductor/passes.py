"""Rewrites of an ONNX graph that are simpler there than after PyTorch has traced it, as onnx_ir passes.

They put nodes of domain `latentrt` into the model in memory, which `engines/inductor/torch/` knows how to compute:

    Linear(x, weights …, biases …)    x Wᵀ + b, one output for each weight; there are as many biases as weights, or none
    GroupNormSilu(x, scale, bias)     GroupNormalization, with its attributes, then SiLU
    Geglu(x)                          the first half · gelu(the second half), along `axis`

Each may run again and changes nothing then. Needs onnx_ir.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from engines.onnx import model as onnx_model
from engines.onnx import patterns
from engines.onnx.patterns import attribute, is_op, only_user
from engines.spec import EngineError

DOMAIN = "latentrt"
PRODUCTS = {"Linear", "Gemm", "MatMul", "Conv"}
"""Operators that sum products: what follows one is no angle of a timestep."""


def read(path: Path) -> ir.Model:
    """Return the model of an ONNX file. Raises EngineError for another file, or operators that are not ONNX's own."""
    model = onnx_model.read(path, "backend inductor")
    if other := next((node for node in model.graph if node.domain), None):
        raise EngineError(f"{path}: got operator {other.domain}::{other.op_type}, expected ONNX's own; "
                          "export the bundle again")
    return model


def rewrite(model: ir.Model, fuse: bool) -> bool:
    """Run every pass of this file; return whether one changed something. fuse: `MergeLinears` too."""
    passes = [Linears(), common.RemoveUnusedNodesPass(), Silus(), Geglus(), *([MergeLinears()] if fuse else [])]
    return bool(ir.passes.Sequential(*passes)(model).modified)


class Linears(ir.passes.InPlacePass):
    """Name the matrix products with a stored weight as PyTorch does.

        before   weight ─▶ Transpose ─▶ MatMul(x, …) ─▶ Add(bias)      Gemm(x, weight, bias, transB=1)
        after    latentrt::Linear(x, weight, bias)
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return ir.passes.PassResult(model, _everywhere(model, self._gemm, self._product))

    def _gemm(self, graph: ir.Graph, node: ir.Node) -> bool:
        if not is_op(node, "Gemm"):
            return False
        weight, bias = node.inputs[1], patterns.argument(node, 2)
        scales = [attribute(node, name, value) for name, value in
                  (("alpha", 1.0), ("beta", 1.0), ("transA", 0), ("transB", 0))]
        if scales != [1.0, 1.0, 0, 1] or not is_weight(weight) or (bias is not None and not _is_bias(bias, weight)):
            return False
        _put(graph, [node], "Linear", [node.inputs[0], weight, *([bias] if bias is not None else [])], node.outputs)
        return True

    def _product(self, graph: ir.Graph, node: ir.Node) -> bool:
        stored = patterns.stored(node.inputs[1]) if is_op(node, "MatMul") else None
        if stored is None or not stored.transposed or not is_weight(stored.value) or len(stored.value.shape) != 2:
            return False
        product, weight = node.outputs[0], stored.value
        old, inputs = [node], [node.inputs[0], weight]
        if add := only_user(product, "Add"):
            other = add.inputs[1] if add.inputs[0] is product else add.inputs[0]
            if other is not None and _is_bias(other, weight):
                old, inputs = [node, add], [*inputs, other]
        _put(graph, old, "Linear", inputs, old[-1].outputs)
        return True


class MergeLinears(ir.passes.InPlacePass):
    """Make one of all products that read the same value: query, key and value; keys and values of the text.

        before   Linear(x, q)   Linear(x, k)   Linear(x, v)
        after    Linear(x, q, k, v) ─▶ three outputs
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        groups: dict[Any, list[ir.Node]] = defaultdict(list)
        for node in model.graph:
            if is_op(node, "Linear", DOMAIN):
                groups[node.inputs[0], bool(linear_biases(node))].append(node)
        several = [nodes for nodes in groups.values() if len(nodes) > 1]
        for nodes in several:
            parts = [value for part in (linear_weights, linear_biases) for node in nodes for value in part(node)]
            outputs = [value for node in nodes for value in node.outputs]
            _put(model.graph, nodes, "Linear", [nodes[0].inputs[0], *parts], outputs)
        return ir.passes.PassResult(model, bool(several))


class Silus(ir.passes.InPlacePass):
    """Put the SiLU after a group norm, where nothing else reads that, into the node.

        before   GroupNormalization ─▶ Sigmoid, Mul          GroupNormalization ─▶ Swish
        after    latentrt::GroupNormSilu
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return ir.passes.PassResult(model, _everywhere(model, self._norm))

    def _norm(self, graph: ir.Graph, node: ir.Node) -> bool:
        end = patterns.silu(node.outputs[0]) if is_op(node, "GroupNormalization") else None
        if end is None:
            return False
        between = {use.node for use in node.outputs[0].uses()}
        _put(graph, [node, *between], "GroupNormSilu", node.inputs, end.outputs, patterns.attributes(node))
        return True


class Geglus(ir.passes.InPlacePass):
    """Make one node of GEGLU.

        before   Split ─▶ first, second      second ─▶ Gelu ─▶ Mul(first, …)
        after    latentrt::Geglu
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return ir.passes.PassResult(model, _everywhere(model, self._split))

    def _split(self, graph: ir.Graph, node: ir.Node) -> bool:
        if not is_op(node, "Split") or len(node.outputs) != 2:
            return False
        mul, gelu = only_user(node.outputs[0], "Mul"), only_user(node.outputs[1], "Gelu")
        if gelu is None or attribute(gelu, "approximate", "none") != "none":
            return False
        if only_user(gelu.outputs[0]) is not mul or mul is None:
            return False
        _put(graph, [node, gelu, mul], "Geglu", node.inputs[:1], mul.outputs, {"axis": attribute(node, "axis", 0)})
        return True


def linear_weights(node: ir.Node) -> Sequence[ir.Value]:
    """Return the weights of a Linear, [outputs, inputs] each."""
    return node.inputs[1:1 + len(node.outputs)]


def linear_biases(node: ir.Node) -> Sequence[ir.Value]:
    """Return the biases of a Linear, one for each of its weights, or none."""
    return node.inputs[1 + len(node.outputs):]


def is_weight(value: ir.Value | None) -> bool:
    """Return whether `value` is an initializer of more than one floating-point value, which can be refitted."""
    return (value is not None and value.is_initializer() and patterns.is_float(value)
            and value.const_value.size > 1)


def angles(graph: ir.Graph) -> set[ir.Value]:
    """Return what sines and cosines are computed from, and those: what embeds the timestep, which needs float32.

    bfloat16 has no 999, and angles that are off by a radian are other angles. What depends on a weight's product or
    convolution is no such angle.
    """
    wide: set[ir.Value] = set()
    for node in graph:
        if not is_op(node, "Sin") and not is_op(node, "Cos"):
            continue
        above: set[ir.Value] = set()
        todo = [*node.outputs]
        while todo:
            if (value := todo.pop()) not in above:
                above.add(value)
                todo += [v for v in value.producer().inputs if v is not None] if value.producer() else []
        if not {value.producer().op_type for value in above if value.producer()} & PRODUCTS:
            wide |= above
    return wide


def _is_bias(value: ir.Value, weight: ir.Value) -> bool:
    return is_weight(value) and patterns.shape(value) == patterns.shape(weight)[:1]


def _everywhere(model: ir.Model, *rewrites: Callable[[ir.Graph, ir.Node], bool]) -> bool:
    """Try `rewrites` on every node in turn; return whether one of them did something."""
    done = [rewrite(model.graph, node) for node in tuple(model.graph) for rewrite in rewrites]
    return any(done)


def _put(graph: ir.Graph, old: Sequence[ir.Node], kind: str, inputs: Sequence[ir.Value | None],
         outputs: Sequence[ir.Value], attributes: dict[str, Any] | None = None) -> None:
    """Put a node of DOMAIN where the first of the nodes `old` is, which all go; it gives `outputs`, as they did."""
    new = ir.node(kind, inputs, attributes or {}, domain=DOMAIN, num_outputs=len(outputs))
    ir.convenience.replace_nodes_and_values(graph, old[0], old, [new], outputs, new.outputs)
