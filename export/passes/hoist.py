"""Step-invariant code motion: cut out of the UNet what does not depend on the sample.

A node belongs to the text if it depends on nothing but the text, to the time if on nothing but the timestep, and else
to the step. Three graphs come of it, which share the weights file of the whole one:

    text   encoder_hidden_states ─▶ keys and values of every cross-attention       once for a request
    time   timestep ─▶ the embedding, and every block's projection of it           once for a schedule; in
                Stable Diffusion XL also of the pooled text and of sizes, which add to the embedding
    body   sample and all of these ─▶ noise_pred                                   every step

A ControlNet is cut in the same way, and has a fourth: hint, its picture ─▶ features, once for a request.

Dependency alone decides, so whatever else a model computes from one of the two moves too. What depends on both stays,
and so does layout (Reshape, Transpose …) behind the last computation, which backends fuse with what reads it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import onnx_ir as ir
from onnx_ir.passes import common

from engines.spec import TensorSpec
from export.errors import ExportError

logger = logging.getLogger(__name__)

LAYOUT = ("Cast", "Expand", "Flatten", "Identity", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Transpose",
          "Unsqueeze")
"""Operators that compute nothing."""


class Part(NamedTuple):
    """A part is one of the graphs, with what goes in and comes out."""

    model: ir.Model
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def hoist(model: ir.Model, invariant: Mapping[str, Collection[str]], inputs: Sequence[TensorSpec],
          outputs: Sequence[TensorSpec],
          shapes: Mapping[str, tuple[int | str | None, ...]] | None = None) -> dict[str, Part]:
    """Cut a model, which is of no use after that, and return its parts; none where a part would compute nothing.

    invariant: name of a part, "text" or "time" → those of `inputs` that it may depend on. The rest is "body", which
    comes last. What is handed to it is float32 and has the name of the layer that computes it. shapes: part → the shape
    of what it hands over, where ONNX cannot infer it, as from pixels to latents; None for a dimension that it can.
    Raises ExportError where the shape of what is handed over is not known, or the parts together do not compute what
    the whole does, each node once.
    """
    common.ShapeInferencePass()(model)  # for the dtypes
    computed = _computations(model.graph)
    cut = {part: _frontier(model.graph, names) for part, names in invariant.items()}
    if not all(cut.values()):
        return {}
    for part, shape in (shapes or {}).items():
        for value in cut[part]:
            inferred = value.shape or [None] * len(shape)
            value.shape = ir.Shape([known if known is not None else inferred[n] for n, known in enumerate(shape)])
    _name_after_layers([value for values in cut.values() for value in values])
    given = {spec.name: spec for spec in inputs}
    parts: dict[str, Part] = {}
    for part, values in cut.items():
        graph = ir.convenience.extract(model.graph, model.graph.inputs, values)
        _read_sizes_of(graph, [given[name] for name in invariant[part] if name in given])
        _end_in_float32(graph)
        made, read = _finish(graph, model, given)
        parts[part] = Part(made, read, tuple(_spec(value, given) for value in graph.outputs))
        given |= {spec.name: spec for spec in parts[part].outputs}
    values = [value for part in cut.values() for value in part]
    elsewhere = {name for names in invariant.values() for name in names}
    graph = ir.convenience.extract(model.graph, [*model.graph.inputs, *values], model.graph.outputs)
    _read_sizes_of(graph, [given[str(value.name)] for value in graph.inputs if str(value.name) not in elsewhere])
    _start_from_float32(graph, {value.name for value in values})
    parts["body"] = Part(*_finish(graph, model, given), tuple(outputs))
    _check(str(model.graph.name), computed, parts)
    return parts


def _check(name: str, whole: Counter[str], parts: Mapping[str, Part]) -> None:
    """Raise ExportError unless every node of the whole that computes something is in one part."""
    found = {part: _computations(made.model.graph) for part, made in parts.items()}
    if (total := sum(found.values(), Counter[str]())) != whole:
        differ = sorted(op for op in total.keys() | whole.keys() if total[op] != whole[op])
        raise ExportError(f"{name}: its parts have {sum(total.values())} nodes that compute something, expected the "
                          f"{sum(whole.values())} of the whole; {', '.join(differ)} differ")
    logger.info("%s: cut into %s", name, ", ".join(f"{part} ({sum(ops.values())})" for part, ops in found.items()))


def _computations(graph: ir.Graph) -> Counter[str]:
    """Count the nodes that compute something from an input's values, by their operators."""
    read = _read(graph)
    return Counter(node.op_type for node in graph
                   if node.op_type not in LAYOUT and any(read[value] for value in node.outputs))


def _finish(graph: ir.Graph, whole: ir.Model,
            given: Mapping[str, TensorSpec]) -> tuple[ir.Model, tuple[TensorSpec, ...]]:
    """Make a model of one part, whose weights stay in the whole model's file; returns it and its inputs."""
    for value in [value for value in graph.inputs if not value.uses()]:
        graph.inputs.remove(value)
    for value in graph.inputs:
        value.shape = ir.Shape(given[str(value.name)].shape)
    for name in [name for name in whole.graph.initializers if name in graph.initializers]:  # `extract` has no order
        graph.initializers.add(graph.initializers.pop(name))
    model = ir.Model(graph, ir_version=whole.ir_version, producer_name=whole.producer_name,
                     producer_version=whole.producer_version)
    common.ShapeInferencePass()(model)
    return model, tuple(given[str(value.name)] for value in graph.inputs)


def _name_after_layers(values: Sequence[ir.Value]) -> None:
    """Name each value after the first weight found above it: "….attn2.to_k.weight" gives "….attn2.to_k"."""
    taken: set[str] = set()
    for value in values:
        weight, todo = None, [value.producer()]
        while todo and weight is None:
            node = todo.pop(0)
            weight = next((v for v in node.inputs if v is not None and v.is_initializer() and "." in str(v.name)), None)
            todo += node.predecessors()
        name = str(value.name if weight is None else weight.name).rpartition(".")[0] or str(value.name)
        while name in taken:
            name += "_"
        taken.add(name)
        value.name = name


def _end_in_float32(graph: ir.Graph) -> None:
    for n, value in enumerate(graph.outputs):
        if value.dtype != ir.DataType.FLOAT:
            cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
            graph.append(cast)
            name, value.name = value.name, f"{value.name}.narrow"
            cast.outputs[0].name = name
            cast.outputs[0].dtype = ir.DataType.FLOAT
            graph.outputs[n] = cast.outputs[0]


def _start_from_float32(graph: ir.Graph, names: Collection[str | None]) -> None:
    for value in graph.inputs:
        if value.name in names and value.dtype != ir.DataType.FLOAT:
            cast = ir.node("Cast", [value], {"to": value.dtype})
            cast.outputs[0].dtype = value.dtype
            value.replace_all_uses_with(cast.outputs[0])
            cast.replace_input_with(0, value)
            graph.insert_before(graph[0], cast)
            value.type = ir.TensorType(ir.DataType.FLOAT)  # a new one: the other parts share the old


def _spec(value: ir.Value, given: Mapping[str, TensorSpec]) -> TensorSpec:
    dims = _dims(value)
    known = {d for spec in given.values() for d in spec.shape}
    if unknown := [d for d in dims if isinstance(d, str) and d not in known]:
        raise ExportError(f"{value.name}: got dimensions {unknown} handed to the body, expected those of the inputs")
    return TensorSpec(str(value.name), "float32", dims)


def _read_sizes_of(graph: ir.Graph, specs: Sequence[TensorSpec]) -> None:
    """Read every size of the first of the inputs `specs` that has it: the batch is that of the text and the sample."""
    dims = {str(value.name): value for value in graph.inputs}
    places = {dim: (dims[spec.name], at) for spec in reversed(specs) for at, dim in enumerate(spec.shape)}
    for node in graph:
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", 0)
        if node.op_type == "Shape" and node.inputs[0] in dims.values() and end == start + 1:
            value, at = places[_dims(node.inputs[0])[start]]
            node.replace_input_with(0, value)
            node.attributes["start"], node.attributes["end"] = ir.AttrInt64("start", at), ir.AttrInt64("end", at + 1)


def _dims(value: ir.Value) -> tuple[int | str, ...]:
    return tuple(d if isinstance(d, int) else str(d.value) for d in value.shape or ())


def _frontier(graph: ir.Graph, names: Collection[str]) -> list[ir.Value]:
    """Return the last values that are computed from the inputs `names` alone."""
    read = _read(graph)
    moved: set[ir.Node] = set()
    for node in reversed(graph):
        alone = all(read[value] and read[value] <= set(names) for value in node.outputs)
        if alone and (node.op_type not in LAYOUT or any(n in moved for n in node.successors())):
            moved.add(node)
    return [value for node in graph if node in moved for value in node.outputs
            if value.is_graph_output() or any(user not in moved for user in value.consumers())]


def _read(graph: ir.Graph) -> dict[ir.Value | None, frozenset[str]]:
    """Map each value to the inputs that it depends on. Sizes count for nothing: a graph reads them of any input."""
    read: dict[ir.Value | None, frozenset[str]] = {value: frozenset([str(value.name)]) for value in graph.inputs}
    for node in graph:
        of = () if node.op_type == "Shape" else node.inputs
        found = frozenset[str]().union(*(read.get(value, frozenset()) for value in of))
        read |= dict.fromkeys(node.outputs, found)
    return read
