"""Attention across the frames of a video, in the self-attention on a UNet's way up.

In each of these layers the queries are a frame's own, and keys and values come from the first frame and the one before
it, at the same step, by way of what their layers of that name were given (Text2Video-Zero, arXiv 2303.13439, has the
first frame alone).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from engines.onnx.patterns import only_user
from engines.spec import TensorSpec
from export.errors import ExportError


class FrameSpecs(NamedTuple):
    """Inputs and outputs of a UNet that attends across frames, beside its own; of each layer one.

    store: float32 [batch], 1 for a row that attends to itself, as a first frame does. first, previous: float32
    [batch, h, w, C], what a layer was given in the first frame and in the one before. hidden: outputs, in this one.
    """

    store: TensorSpec
    first: tuple[TensorSpec, ...]
    previous: tuple[TensorSpec, ...]
    hidden: tuple[TensorSpec, ...]

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """All but the outputs, in the order of the graph's inputs."""
        return (self.store, *self.first, *self.previous)


def add_frames(layers: Sequence[str], specs: FrameSpecs, model: ir.Model) -> int:
    """Give a UNet, whole or its body, the inputs and outputs `specs`; returns how many layers attend across frames.

        h ─┬▶ to_k, to_v     ─▶     h ─▶ where(store, h, first_n)    ─┐
           └▶ to_q                  h ─▶ where(store, h, previous_n) ─┴▶ concat ─▶ to_k, to_v
                                    h ─▶ hidden_n

    layers: names of the attention layers, whose weights are NAME.to_k.weight and NAME.to_v.weight. A row that attends
    to itself has every key twice, which gives the same softmax. Raises ExportError where a layer is not in the graph.
    """
    common.ShapeInferencePass()(model)  # for the dtypes
    inputs = {spec: ir.Value(name=spec.name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(spec.shape))
              for spec in specs.inputs}
    model.graph.inputs.extend(inputs.values())
    tape = _Tape()
    limit = tape.constant("store_limit", np.array(0.5, np.float32))
    axes = tape.constant("store_axes", np.array([1, 2], np.int64))
    own = tape.op("Greater", [inputs[specs.store], limit], ir.DataType.BOOL)
    own = tape.op("Unsqueeze", [own, axes], ir.DataType.BOOL)
    model.graph.insert_before(model.graph[0], tape.take())
    count = 0
    for n, (name, *others, hidden) in enumerate(zip(layers, specs.first, specs.previous, specs.hidden, strict=True)):
        users = [_product(model.graph, f"{name}.{weight}.weight") for weight in ("to_k", "to_v")]
        told, given = _cross(tape, n, users[0].inputs[0], own, [inputs[spec] for spec in others])
        given.name, given.shape = hidden.name, ir.Shape(hidden.shape)
        model.graph.insert_before(min(users, key=list(model.graph).index), tape.take())
        for user in users:
            user.replace_input_with(0, told)
        model.graph.outputs.append(given)
        count += 1
    for value in tape.constants:
        model.graph.initializers.add(value)
    return count


def _cross(tape: _Tape, n: int, h: ir.Value, own: ir.Value,
           others: Sequence[ir.Value]) -> tuple[ir.Value, ir.Value]:
    """Return what keys and values of layer n are computed from, and `h`, what it was given, as an output."""
    assert h is not None and h.dtype is not None
    tokens = tape.constant(f"tokens_{n}", np.array([0, -1, others[0].shape[3]], np.int64))
    both = []
    for frame in others:
        other = tape.op("Reshape", [frame, tokens], ir.DataType.FLOAT)
        if h.dtype != ir.DataType.FLOAT:
            other = tape.op("Cast", [other], h.dtype, to=h.dtype)
        both.append(tape.op("Where", [own, h, other], h.dtype))
    told = tape.op("Concat", both, h.dtype, axis=1)
    wide = h if h.dtype == ir.DataType.FLOAT else tape.op("Cast", [h], ir.DataType.FLOAT, to=ir.DataType.FLOAT)
    size = tape.op("Shape", [others[0]], ir.DataType.INT64)
    return told, tape.op("Reshape", [wide, size], ir.DataType.FLOAT)


class _Tape:
    """Nodes and constants as they are made, named after one another."""

    def __init__(self) -> None:
        self.constants: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._count = 0

    def take(self) -> list[ir.Node]:
        """Hand over the nodes that were made since the last call."""
        taken, self._nodes = self._nodes, []
        return taken

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        value = ir.Value(name=f"frames_{name}", const_value=ir.tensor(array, name=f"frames_{name}"))
        value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
        self.constants.append(value)
        return value

    def op(self, kind: str, inputs: Sequence[ir.Value], dtype: ir.DataType, **attributes: Any) -> ir.Value:
        node = ir.node(kind, inputs, attributes or None)
        node.name = f"frames_{self._count}"
        self._count += 1
        out = node.outputs[0]
        out.name, out.dtype = node.name, dtype
        self._nodes.append(node)
        return out


def _product(graph: ir.Graph, weight: str) -> ir.Node:
    """Find the node that multiplies by a weight, transposed or not."""
    value = graph.initializers.get(weight)
    while value is not None:
        if product := only_user(value, "MatMul"):
            return product
        transpose = only_user(value, "Transpose")
        value = transpose.outputs[0] if transpose else None
    raise ExportError(f"{graph.name}: the graph has no product with {weight}, expected one; this version of PyTorch or "
                      "diffusers computes it in another way")
