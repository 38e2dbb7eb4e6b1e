"""Patterns of ONNX graphs, matched by operator, domain, attributes and who reads what, never by a node's name.

Needs onnx_ir, so that only what works on graphs imports this: `engines.onnx.model.read` says what to install first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import onnx_ir as ir

SWAP = (0, 2, 1, 3)
"""The permutation that swaps tokens and heads."""
DTYPES = {ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16", ir.DataType.FLOAT: "fp32"}
"""ONNX element type → the name that configs have for it."""


class Stored(NamedTuple):
    """An initializer as a node reads it, by way of transposes or not."""

    value: ir.Value
    transposed: bool


def is_op(node: ir.Node | None, kind: str, domain: str = "") -> bool:
    """Return whether `node` is one of operator `kind`, which is ONNX's own where no domain is given."""
    return node is not None and (node.domain, node.op_type) == (domain, kind)


def attributes(node: ir.Node) -> dict[str, Any]:
    """Return the attributes that `node` has, values by name."""
    return {name: attribute.value for name, attribute in node.attributes.items()}


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """Return the value of an attribute, or `default` where the node leaves it out."""
    return node.attributes[name].value if name in node.attributes else default


def argument(node: ir.Node, at: int) -> ir.Value | None:
    """Return the input of that number, None where the node leaves it out."""
    return node.inputs[at] if at < len(node.inputs) else None


def only_user(value: ir.Value, kind: str = "") -> ir.Node | None:
    """Return the node that reads `value`, where that is the only one, reads it once, and is one of operator `kind`.

    kind: of ONNX's own operators; "" takes any. None too where `value` is an output of the graph.
    """
    users = [use.node for use in value.uses()]
    if len(users) != 1 or value.is_graph_output() or (kind and not is_op(users[0], kind)):
        return None
    return users[0]


def silu(value: ir.Value) -> ir.Node | None:
    """Return the node that ends the SiLU of `value`, x · sigmoid(x), where nothing else reads `value`.

        value ─┬▶ Sigmoid ─▶ Mul          value ─▶ Swish
               └────────────▶
    """
    if swish := only_user(value, "Swish"):
        return swish if attribute(swish, "alpha", 1.0) == 1.0 else None
    users = {use.node.op_type: use.node for use in value.uses() if use.node.domain == ""}
    if value.is_graph_output() or len(value.uses()) != 2 or set(users) != {"Sigmoid", "Mul"}:
        return None
    return users["Mul"] if only_user(users["Sigmoid"].outputs[0]) is users["Mul"] else None


def is_swap(node: ir.Node | None) -> bool:
    """Return whether `node` swaps tokens and heads: [batch, tokens, heads, head dim], or the reverse."""
    return is_op(node, "Transpose") and tuple(attribute(node, "perm", ())) == SWAP


def stored(value: ir.Value | None) -> Stored | None:
    """Return the floating-point initializer that `value` is, behind any casts and transposes; None for another value.

        weight ─▶ Cast ─▶ Transpose ─▶ value
    """
    transposed = False
    while value is not None and (is_op(node := value.producer(), "Cast") or is_op(node, "Transpose")):
        perm = attribute(node, "perm") if node.op_type == "Transpose" else ()
        transposed ^= perm is None or list(perm) != sorted(perm)
        value = node.inputs[0]
    return Stored(value, transposed) if value is not None and is_float(value) and value.is_initializer() else None


def is_float(value: ir.Value) -> bool:
    """Return whether `value` is known to be of floating point."""
    return value.dtype is not None and bool(value.dtype.is_floating_point())


def shape(value: ir.Value | None) -> tuple[int, ...]:
    """Return the shape of `value`, () where it is not known in full."""
    if value is None or value.shape is None or not value.shape.is_static():
        return ()
    return tuple(value.shape.numpy())


def dtype(value: ir.Value) -> str:
    """Return the config's name for the element type of `value`, such as "fp16"; "unknown" for the types without."""
    return DTYPES.get(value.dtype, "unknown")
