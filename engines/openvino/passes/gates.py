"""Feed-forwards whose one half gates the other: a product for each half, and weights cut in two."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from engines.openvino.passes.match import RESHAPES, constant, halving, number

HALF = "#half"
"""What stands between the name of a weight and the number of its half."""


class _Linear(NamedTuple):
    """x · weight + bias, with constant weight and bias. transposed: whether the weight is."""

    x: Any
    weight: Any
    bias: Any
    transposed: bool


def halve_gates(ov: Any, model: Any) -> int:
    """Multiply by each half of a weight where the product is split in two anyway; return at how many sites.

        before   x ─▶ MatMul(w), Add(b) ─▶ Split ─▶ …
        after    x ─▶ MatMul(w₁), Add(b₁) ─▶ … and x ─▶ MatMul(w₂), Add(b₂) ─▶ …

    Nothing is copied, and the activation of the gate becomes part of its product. w₁ and w₂ are a Split of w, which
    `fold_halves` folds.
    """
    opset, count = ov.opset13, 0
    for op in halving(model):
        if (linear := _linear(op.input_value(0).get_node())) is None or not _halves_last(op):
            continue
        weights = opset.split(linear.weight, opset.constant(np.int64(0 if linear.transposed else 1)), 2)
        biases = opset.split(linear.bias, opset.constant(np.int64(len(linear.bias.get_shape()) - 1)), 2)
        for half in range(2):
            product = opset.matmul(linear.x, weights.output(half), False, linear.transposed)
            op.output(half).replace(opset.add(product, biases.output(half)).output(0))
        count += 1
    if count:
        model.validate_nodes_and_infer_types()
    return count


def fold_halves(ov: Any, model: Any) -> int:
    """Cut constants in two where `halve_gates` left that to every compilation; return how many.

        before   w ─▶ Split(axis 0) ─▶ …
        after    w#half0, w#half1 ─▶ …
    """
    count = 0
    for op in halving(model):
        whole = op.input_value(0).get_node()
        if whole.get_type_name() != "Constant" or number(op.input_value(1)) != 0:
            continue
        for index, half in enumerate(np.split(whole.get_data(), 2)):
            tensor = ov.Tensor(whole.get_element_type(), ov.Shape(list(half.shape)))
            tensor.data[...] = half
            part = ov.op.Constant(tensor)
            part.set_friendly_name(f"{whole.get_friendly_name()}{HALF}{index}")
            op.output(index).replace(part.output(0))
        count += 1
    if count:
        model.validate_nodes_and_infer_types()
    return count


def _linear(add: Any) -> _Linear | None:
    for product, bias in (add.input_values(), add.input_values()[::-1]) if add.get_type_name() == "Add" else ():
        node = product.get_node()
        if node.get_type_name() == "MatMul" and len(product.get_target_inputs()) == 1:
            x, weight = node.input_values()
            attributes = node.get_attributes()
            if (constant(weight, RESHAPES) is not None and len(weight.get_shape()) == 2
                    and constant(bias, RESHAPES) is not None
                    and bias.get_shape()[-1:] == product.get_shape()[-1:] and not attributes["transpose_a"]):
                return _Linear(x, weight, bias, attributes["transpose_b"])
    return None


def _halves_last(split: Any) -> bool:
    """Return whether a Split divides the last axis of a value that nothing else reads."""
    axis = number(split.input_value(1))
    value = split.input_value(0)
    return axis in (-1, len(value.get_shape()) - 1) and len(value.get_target_inputs()) == 1
