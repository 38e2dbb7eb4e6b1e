"""An ONNX graph as a list of nodes, and the rewrites that are simpler there than after PyTorch has traced it.

Everything is found by operator, attributes and who uses what, never by a node's name. Needs onnx_ir.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engines.onnx.initializers import BFLOAT16, FLOAT, FLOAT16, Initializer, initializers, values
from engines.spec import EngineError

PIP = "pip install onnx-ir"
FLOATS = (FLOAT, FLOAT16, BFLOAT16, 11)


@dataclass(frozen=True)
class Node:
    """One operator of the default domain; an absent input is "".

    Beside ONNX's own there are `Linear` (outputs: x Wᵀ + b, cut into as many parts as it has weights; attributes:
    weights and biases, names, of which the latter may be none), `Geglu` (first half · gelu(second half) along axis),
    and an attribute `silu` of GroupNormalization.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """Nodes in an order that can be run, names of inputs and outputs, and initializers as they are stored.

    types: whether values are floating-point, which those of bfloat16 do not say themselves.
    """

    nodes: list[Node]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    values: Mapping[str, np.ndarray]
    types: Mapping[str, Initializer]

    def is_weight(self, name: str) -> bool:
        """Whether `name` is an initializer of more than one floating-point value."""
        return name in self.values and self.types[name].type in FLOATS and self.values[name].size > 1

    def shape(self, name: str) -> tuple[int, ...]:
        return self.types[name].shape

    def numbers(self, name: str) -> np.ndarray:
        """An initializer as numpy computes with it: 16-bit floats as float32."""
        values, kind = self.values[name], self.types[name].type
        if kind == BFLOAT16:
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32) if kind in FLOATS else values

    def users(self) -> dict[str, list[Node | None]]:
        """Value → the nodes that read it, once for each time; None for an output of the graph."""
        found: dict[str, list[Node | None]] = defaultdict(list)
        for node in self.nodes:
            for name in node.inputs:
                found[name].append(node)
        for name in self.outputs:
            found[name].append(None)
        return found

    def replace(self, old: Mapping[str, Node | None]) -> Graph:
        """The graph with the nodes whose first output is in `old` replaced, or dropped."""
        nodes = [old.get(node.outputs[0], node) for node in self.nodes]
        return dataclasses.replace(self, nodes=[node for node in nodes if node is not None])


def read(path: Path) -> Graph:
    """Read an ONNX file; large weights stay on disk. Raises EngineError where it is none, or onnx_ir is missing."""
    try:
        import onnx_ir as ir
    except ImportError as e:
        raise EngineError(f"backend inductor reads ONNX files with onnx_ir, which is missing; run: {PIP}") from e
    try:
        model = ir.load(path)
    except Exception as e:  # of protobuf, numpy and the file system
        raise EngineError(f"{path}: not a readable ONNX file ({e}); export the bundle again") from e
    nodes = []
    for node in model.graph:
        if node.domain not in ("", "ai.onnx"):
            raise EngineError(f"{path}: got operator {node.domain}::{node.op_type}, expected ONNX's own; "
                              "export the bundle again")
        nodes.append(Node(node.op_type, tuple(value.name or "" if value is not None else "" for value in node.inputs),
                          tuple(value.name or "" for value in node.outputs),
                          {name: attribute.value for name, attribute in node.attributes.items()}))
    return Graph(nodes, tuple(str(v.name) for v in model.graph.inputs), tuple(str(v.name) for v in model.graph.outputs),
                 values(path), initializers(path.read_bytes()))


def dtype_name(number: int) -> str:
    """numpy's name of an ONNX element type: "float16", "int64" …; torch has the same."""
    import onnx_ir as ir

    return str(ir.DataType(number).numpy())


def constant(node: Node) -> np.ndarray:
    """The value of a Constant node. Raises EngineError for a kind that graphs of ours do not have."""
    for name in ("value", "value_int", "value_ints", "value_float", "value_floats"):
        if name in node.attributes:
            value = node.attributes[name]
            value = value.numpy() if name == "value" else np.array(value)
            return value.astype(np.float32) if value.dtype.kind not in "iub" else value
    raise EngineError(f"inductor: got a Constant with {sorted(node.attributes)}, expected a tensor or numbers; "
                      "use another backend")


def linears(graph: Graph) -> Graph:
    """Name the matrix products with a weight as PyTorch does.

    before   weight ─▶ Transpose ─▶ MatMul ─▶ Add      Gemm(transB=1)
    after    Linear(weights=(weight,), biases=(bias,))  Linear
    """
    users, producers = graph.users(), {node.outputs[0]: node for node in graph.nodes}
    changed: dict[str, Node | None] = {}
    for node in graph.nodes:
        if node.op == "Gemm" and _plain_gemm(graph, node):
            biases = tuple(name for name in node.inputs[2:] if name)
            changed[node.outputs[0]] = Node("Linear", node.inputs[:1], node.outputs,
                                            {"weights": (node.inputs[1],), "biases": biases})
        elif node.op == "MatMul" and (weight := _transposed_weight(graph, producers.get(node.inputs[1]))):
            add = users[node.outputs[0]][0] if len(users[node.outputs[0]]) == 1 else None
            bias = _bias(graph, add, node.outputs[0], graph.shape(weight)[0]) if add is not None else ()
            changed[node.outputs[0]] = Node("Linear", node.inputs[:1], add.outputs if add and bias else node.outputs,
                                            {"weights": (weight,), "biases": bias})
            if add is not None and bias:
                changed[add.outputs[0]] = None
    return _without_unused(graph.replace(changed))


def merge_linears(graph: Graph) -> Graph:
    """Make one of all products that read the same value: query, key and value; keys and values of the text.

    before   Linear(x, q)   Linear(x, k)   Linear(x, v)
    after    Linear(x, (q, k, v)) ─▶ three outputs
    """
    groups: dict[Any, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "Linear":
            groups[node.inputs, bool(node.attributes["biases"])].append(node)
    changed: dict[str, Node | None] = {}
    for nodes in groups.values():
        if len(nodes) > 1:
            names = {key: tuple(name for n in nodes for name in n.attributes[key]) for key in ("weights", "biases")}
            changed |= {n.outputs[0]: None for n in nodes[1:]}
            changed[nodes[0].outputs[0]] = Node("Linear", nodes[0].inputs, tuple(n.outputs[0] for n in nodes), names)
    return graph.replace(changed)


def silus(graph: Graph) -> Graph:
    """Put the SiLU after a group norm, where nothing else reads that, into the node.

    before   GroupNormalization ─▶ Sigmoid, Mul          GroupNormalization ─▶ Swish
    after    GroupNormalization(silu=1)
    """
    users = graph.users()
    changed: dict[str, Node | None] = {}
    for node in graph.nodes:
        if node.op == "GroupNormalization" and (end := _silu(users, node)):
            changed |= {user.outputs[0]: None for user in users[node.outputs[0]] if user is not None}
            changed[node.outputs[0]] = Node(node.op, node.inputs, end.outputs, {**node.attributes, "silu": 1})
    return graph.replace(changed)


def geglus(graph: Graph) -> Graph:
    """Make one node of GEGLU.

    before   Split ─▶ first, second      second ─▶ Gelu ─▶ Mul(first, gelu)
    after    Geglu
    """
    users = graph.users()
    changed: dict[str, Node | None] = {}
    for node in graph.nodes:
        if node.op != "Split" or len(node.outputs) != 2:
            continue
        gelu = _only(users[node.outputs[1]], "Gelu")
        mul = _only(users[node.outputs[0]], "Mul")
        if (gelu and mul and _text(gelu.attributes.get("approximate", "none")) == "none"
                and _only(users[gelu.outputs[0]], "Mul") is mul):
            changed |= {node.outputs[0]: Node("Geglu", node.inputs[:1], mul.outputs, {"axis": node.attributes["axis"]}),
                        gelu.outputs[0]: None, mul.outputs[0]: None}
    return graph.replace(changed)


def angles(graph: Graph) -> set[str]:
    """Values that sines and cosines are computed from, and those: what embeds the timestep, which needs float32.

    bfloat16 has no 999, and angles that are off by a radian are other angles. What depends on a weight's product or
    convolution is no such angle.
    """
    producers = {name: node for node in graph.nodes for name in node.outputs}
    found: set[str] = set()
    for node in graph.nodes:
        if node.op in ("Sin", "Cos"):
            above: set[str] = set()
            todo = [*node.outputs]
            while todo:
                if (name := todo.pop()) not in above:
                    above.add(name)
                    todo += producers[name].inputs if name in producers else ()
            if not {producers[name].op for name in above & set(producers)} & {"Linear", "Gemm", "MatMul", "Conv"}:
                found |= above
    return found


def _plain_gemm(graph: Graph, node: Node) -> bool:
    a = node.attributes
    usual = (a.get("alpha", 1.0), a.get("beta", 1.0), a.get("transA", 0), a.get("transB", 0)) == (1.0, 1.0, 0, 1)
    size = graph.shape(node.inputs[1])[:1] if graph.is_weight(node.inputs[1]) else ()
    return bool(size) and usual and all(graph.is_weight(b) and graph.shape(b) == size for b in node.inputs[2:] if b)


def _transposed_weight(graph: Graph, node: Node | None) -> str | None:
    if node is None or node.op != "Transpose" or list(node.attributes.get("perm", (1, 0))) != [1, 0]:
        return None
    return node.inputs[0] if graph.is_weight(node.inputs[0]) and len(graph.shape(node.inputs[0])) == 2 else None


def _bias(graph: Graph, add: Node, product: str, size: int) -> tuple[str, ...]:
    if add.op != "Add":
        return ()
    other = add.inputs[1] if add.inputs[0] == product else add.inputs[0]
    return (other,) if graph.is_weight(other) and graph.shape(other) == (size,) else ()


def _silu(users: Mapping[str, list[Node | None]], node: Node) -> Node | None:
    """The node that ends x · sigmoid(x), where x is the output of `node` and nothing else reads it."""
    x = node.outputs[0]
    found = users[x]
    if swish := _only(found, "Swish"):
        return swish if swish.attributes.get("alpha", 1.0) == 1.0 else None
    by_op = {user.op: user for user in found if user is not None}
    if len(found) != 2 or set(by_op) != {"Sigmoid", "Mul"}:
        return None
    mul, sigmoid = by_op["Mul"], by_op["Sigmoid"].outputs[0]
    return mul if set(mul.inputs) == {x, sigmoid} and len(users[sigmoid]) == 1 else None


def _only(users: list[Node | None], op: str) -> Node | None:
    """The only user, where it is one of `op`."""
    return users[0] if len(users) == 1 and users[0] is not None and users[0].op == op else None


def _without_unused(graph: Graph) -> Graph:
    users = graph.users()
    return graph.replace({node.outputs[0]: None for node in graph.nodes if not any(users[n] for n in node.outputs)})


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
