"""The parameters of a graph: the weights that its operators read, those of a linear layer together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import onnx_ir as ir

from engines.inductor.passes import DOMAIN, is_weight, linear_biases, linear_weights
from engines.inductor.torch import fp8
from engines.inductor.torch.known import READ
from engines.inductor.torch.weights import Names, Weight
from engines.onnx.patterns import is_op, shape


def names_of(values: Sequence[ir.Value]) -> Names:
    """Return the name of the parameter that these initializers are, as `Weight.names` has it."""
    return tuple(str(value.name) for value in values)


def weights_of(graph: ir.Graph, dtype: str, angles: Set[ir.Value], in_fp8: Set[Names]) -> dict[str, Weight]:
    """Return every parameter that the graph's operators read, by the name of its buffer: w0, w1 …

    angles: values that are computed in float32. in_fp8: weights of linear layers.
    """
    parameters: dict[Names, Weight] = {}

    def add(values: Sequence[ir.Value], kind: str, last: bool = False) -> None:
        names = names_of(values)
        before = parameters.get(names)
        wide = kind == "fp32" or (before is not None and before.dtype == "fp32")
        parameters[names] = Weight(names, tuple(map(shape, values)), "fp32" if wide else kind,
                                   last or bool(before and before.channels_last))

    for node in graph:
        inputs = node.inputs
        if is_op(node, "Linear", DOMAIN):
            weights, biases = linear_weights(node), linear_biases(node)
            add(weights, "fp8" if names_of(weights) in in_fp8 else dtype)
            if biases:
                add(biases, dtype)
            inputs = inputs[:1]
        for at, value in enumerate(inputs):
            if is_weight(value) and at not in READ.get(node.op_type, ()):
                add((value,), "fp32" if node.outputs[0] in angles else dtype,
                    is_op(node, "Conv") and at == 1 and len(shape(value)) == 4)
    return {f"w{n}": weight for n, weight in enumerate(parameters.values())}


def large_linears(graph: ir.Graph, rows: Mapping[Names, int], least: int) -> frozenset[Names]:
    """Return the weights of the linear layers that are large enough for float8, and that nothing else reads.

    rows: weights of a linear layer → rows of its input. least: rows, inputs and outputs.
    """
    linears: dict[Names, Sequence[ir.Value]] = {}
    elsewhere: set[ir.Value] = set()
    for node in graph:
        linear = is_op(node, "Linear", DOMAIN)
        elsewhere.update(node.inputs[:1] if linear else node.inputs)
        if linear:
            linears[names_of(linear_weights(node))] = linear_weights(node)
    return frozenset(names for names, values in linears.items() if elsewhere.isdisjoint(values) and fp8.fits(
        rows[names], shape(values[0])[1], sum(shape(value)[0] for value in values), least))
