"""Cross-frame attention: the UNet whose self-attention on the way up looks at other frames of a video.

In each of these layers the queries are a frame's own, and keys and values come from the first frame and the one before
it, at the same step, by way of what their layers of that name were given (Text2Video-Zero, arXiv 2303.13439, has the
first frame alone). The graph lies beside the others on one weights file, and takes residuals of ControlNets as well.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from diffusers.models.attention_processor import Attention
from onnx_ir.passes import common
from torch import nn

from engines.spec import TensorSpec
from export.errors import ExportError
from export.families.controlnet import level_size
from export.trace.trace import count_sites

STORE, FIRST, PREVIOUS, HIDDEN = "store", "first", "previous", "hidden"
"""Groups of the tensors that the graph for videos has beside the UNet's own."""

_LAYER = re.compile(r"up_blocks\.(\d+)\..*\.attn1")


def layers(model: nn.Module) -> dict[str, Attention]:
    """Name → self-attention of a UNet's way up, in the order in which they run."""
    return {name: module for name, module in model.named_modules()
            if _LAYER.fullmatch(name) and isinstance(module, Attention)}


def frame_specs(model: nn.Module) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """What the graph of `add_frames` takes and gives beside its UNet's own, for a UNet of diffusers.

    store: float32 [batch], 1 for a row that attends to itself, as a first frame does. first_n, previous_n: float32
    [batch, h, w, C], what layer n was given in the first frame and in the one before; hidden_n: in this one.
    """
    shapes = []
    for name, layer in layers(model).items():
        match = _LAYER.fullmatch(name)
        assert match
        level = len(model.config["block_out_channels"]) - 1 - int(match[1])
        shapes.append(("batch", *level_size(level), layer.to_k.in_features))

    def specs(group: str) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(f"{group}_{n}", "float32", shape, group) for n, shape in enumerate(shapes))

    return (TensorSpec(STORE, "float32", ("batch",), STORE), *specs(FIRST), *specs(PREVIOUS)), specs(HIDDEN)


@contextlib.contextmanager
def crossing(model: nn.Module, given: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Let diffusers' UNet attend across frames in the block: what `add_frames` is compared with.

    given: by the names of `frame_specs`. Yields what it gives, which is there once the model has run.
    """
    found: dict[str, torch.Tensor] = {}
    held = layers(model)
    before = [layer.processor for layer in held.values()]
    try:
        for n, layer in enumerate(held.values()):
            layer.set_processor(_Processor(n, given, found))
        yield found
    finally:
        for layer, processor in zip(held.values(), before, strict=True):
            layer.set_processor(processor)


class _Processor:
    """Attention of layer n in PyTorch."""

    def __init__(self, n: int, given: Mapping[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
        self.n, self.given, self.found = n, given, found

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
                 attention_mask: torch.Tensor | None = None, temb: torch.Tensor | None = None) -> torch.Tensor:
        first, previous = self.given[f"{FIRST}_{self.n}"], self.given[f"{PREVIOUS}_{self.n}"]
        own = self.given[STORE] > 0.5
        self.found[f"{HIDDEN}_{self.n}"] = hidden_states.reshape(first.shape)
        both = [torch.where(own[:, None, None], hidden_states, other.flatten(1, 2)) for other in (first, previous)]
        told = torch.cat(both, dim=1)
        q, k, v = (project(x).unflatten(2, (attn.heads, -1)).transpose(1, 2) for project, x in
                   ((attn.to_q, hidden_states), (attn.to_k, told), (attn.to_v, told)))
        out = nn.functional.scaled_dot_product_attention(q, k, v, scale=attn.scale).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


def add_frames(names: Iterable[str], given: Sequence[TensorSpec], gives: Sequence[TensorSpec], file: Path,
               target: Path) -> dict[str, int]:
    """Write the UNet in `file`, whole or its body, with more inputs and outputs to `target`; returns its kernel sites.

        h ─┬▶ to_k, to_v     ─▶     h ─▶ where(store, h, first_n)    ─┐
           └▶ to_q                  h ─▶ where(store, h, previous_n) ─┴▶ concat ─▶ to_k, to_v

    names: of `layers`; given, gives: of `frame_specs`. A row that attends to itself has every key twice, which gives
    the same softmax. The weights stay in `file`'s. Raises ExportError where a layer is not in the graph.
    """
    model = ir.load(file)
    common.ShapeInferencePass()(model)  # for the dtypes
    inputs = {spec.name: ir.Value(name=spec.name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(spec.shape))
              for spec in given}
    model.graph.inputs.extend(inputs.values())
    tape = _Tape()
    limit = tape.constant("store_limit", np.array(0.5, np.float32))
    axes = tape.constant("store_axes", np.array([1, 2], np.int64))
    own = tape.op("Unsqueeze", [tape.op("Greater", [inputs[STORE], limit], ir.DataType.BOOL), axes], ir.DataType.BOOL)
    model.graph.insert_before(model.graph[0], tape.nodes)
    for n, (name, spec) in enumerate(zip(names, gives, strict=True)):
        users = [_product(model.graph, f"{name}.{weight}.weight", file) for weight in ("to_k", "to_v")]
        h = users[0].inputs[0]
        assert h is not None and h.dtype is not None
        tape.nodes = []
        tokens = tape.constant(f"tokens_{n}", np.array([0, -1, spec.shape[3]], np.int64))
        both = []
        for group in (FIRST, PREVIOUS):
            other = tape.op("Reshape", [inputs[f"{group}_{n}"], tokens], ir.DataType.FLOAT)
            if h.dtype != ir.DataType.FLOAT:
                other = tape.op("Cast", [other], h.dtype, to=h.dtype)
            both.append(tape.op("Where", [own, h, other], h.dtype))
        told = tape.op("Concat", both, h.dtype, axis=1)
        wide = h if h.dtype == ir.DataType.FLOAT else tape.op("Cast", [h], ir.DataType.FLOAT, to=ir.DataType.FLOAT)
        size = tape.op("Shape", [inputs[f"{FIRST}_{n}"]], ir.DataType.INT64)
        hidden = tape.op("Reshape", [wide, size], ir.DataType.FLOAT)
        hidden.name, hidden.shape = spec.name, ir.Shape(spec.shape)
        model.graph.insert_before(min(users, key=list(model.graph).index), tape.nodes)
        for user in users:
            user.replace_input_with(0, told)
        model.graph.outputs.append(hidden)
    for value in tape.constants:
        model.graph.initializers.add(value)
    ir.save(model, target)
    return count_sites(model.graph)


class _Tape:
    """Nodes and constants as they are made, named after one another."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []
        self._count = 0

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
        self.nodes.append(node)
        return out


def _product(graph: ir.Graph, weight: str, file: Path) -> ir.Node:
    """The node that multiplies by a weight, transposed or not."""
    value = graph.initializers.get(weight)
    while value is not None:
        users = list(value.consumers())
        if len(users) == 1 and users[0].op_type == "MatMul":
            return users[0]
        value = users[0].outputs[0] if len(users) == 1 and users[0].op_type == "Transpose" else None
    raise ExportError(f"{file.name}: the graph has no product with {weight}, expected one; this version of PyTorch or "
                      "diffusers computes the UNet in another way")
