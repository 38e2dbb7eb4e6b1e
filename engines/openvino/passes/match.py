"""Patterns of OpenVINO's graphs, matched by operator, attributes and who reads what, never by a node's name."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

SWAP = [0, 2, 1, 3]
"""The permutation that swaps tokens and heads."""
CONVERSIONS = ("Convert", "ConvertLike")
RESHAPES = ("Convert", "Reshape", "Transpose")
"""Operators that only move or convert the values of a constant."""


def nodes(model: Any, *kinds: str) -> list[Any]:
    """Return the nodes of these operators in an order that they can run in."""
    return [op for op in model.get_ordered_ops() if op.get_type_name() in kinds]


def halving(model: Any) -> list[Any]:
    """Return the nodes that split a value in two."""
    return [op for op in nodes(model, "Split") if op.get_output_size() == 2]


def constant(value: Any, behind: Collection[str]) -> Any:
    """Return the constant that `value` is, or that operators of `behind` make it of; None for any other value."""
    node = value.get_node()
    while node.get_type_name() in behind:
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


def number(value: Any) -> float | None:
    """Return a constant of one element, converted or not; None for any other value."""
    node = constant(value, CONVERSIONS)
    return None if node is None or node.get_data().size != 1 else float(node.get_data().reshape(()))


def is_swap(node: Any) -> bool:
    """Return whether `node` swaps tokens and heads: [batch, tokens, heads, head dim], or the reverse."""
    if node.get_type_name() != "Transpose" or (order := constant(node.input_value(1), ())) is None:
        return False
    return [int(axis) for axis in order.get_data()] == SWAP


def silu(op: Any) -> Any:
    """Return the node that ends the SiLU of what `op` gives, x · sigmoid(x), where nothing else reads it; else None.

        op ─┬▶ Sigmoid ─▶ Multiply          op ─▶ Swish
            └────────────▶
    """
    targets = op.output(0).get_target_inputs()
    users = {target.get_node().get_type_name(): target.get_node() for target in targets}
    if set(users) == {"Swish"} and len(targets) == 1:
        return users["Swish"]
    if set(users) == {"Multiply", "Sigmoid"} and len(targets) == 2:
        factors = {value.get_node().get_friendly_name() for value in users["Multiply"].input_values()}
        if factors == {op.get_friendly_name(), users["Sigmoid"].get_friendly_name()}:
            return users["Multiply"]
    return None


def inputs_of(node: Any) -> list[Any]:
    """Return every node that `node` depends on."""
    found: dict[str, Any] = {}
    todo = [value.get_node() for value in node.input_values()]
    while todo:
        node = todo.pop()
        if node.get_friendly_name() not in found:
            found[node.get_friendly_name()] = node
            todo += [value.get_node() for value in node.input_values()]
    return list(found.values())
