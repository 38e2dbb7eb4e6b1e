"""Residuals of ControlNets (arXiv 2302.05543), added to the skip connections of a UNet and to its middle."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes import common

from engines.onnx.patterns import attribute, is_op
from engines.spec import TensorSpec
from export.errors import ExportError


def add_residuals(residuals: Sequence[TensorSpec], model: ir.Model) -> int:
    """Give a UNet, whole or its body, the inputs `residuals`; returns how many it now adds.

        cat([x, skip_n])  ─▶  cat([x, skip_n + residual_n])      and the x of the first of them + the last residual

    Each resnet on the way up joins its input and a skip connection along the channels, the skips in reverse order, and
    the first of these inputs is what comes from the middle. Raises ExportError where the graph does not join as many
    as there are residuals.
    """
    common.ShapeInferencePass()(model)  # for the dtypes
    joins = [node for node in model.graph if is_op(node, "Concat") and len(node.inputs) == 2
             and attribute(node, "axis") == 1][1 - len(residuals):]
    if len(joins) != len(residuals) - 1:
        raise ExportError(f"{model.graph.name}: the graph joins {len(joins)} skip connections, expected "
                          f"{len(residuals) - 1}; this version of PyTorch or diffusers computes it in another way")
    places = [*((join, 1) for join in reversed(joins)), (joins[0], 0)]
    for spec, (join, side) in zip(residuals, places, strict=True):
        x = join.inputs[side]
        residual = ir.Value(name=spec.name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(spec.shape))
        model.graph.inputs.append(residual)
        nodes = [ir.node("Cast", [residual], {"to": x.dtype})] if x.dtype != ir.DataType.FLOAT else []
        nodes.append(ir.node("Add", [x, nodes[0].outputs[0] if nodes else residual]))
        for n, node in enumerate(nodes):
            node.name = node.outputs[0].name = f"{spec.name}_{'added' if n + 1 == len(nodes) else 'narrow'}"
            node.outputs[0].dtype = x.dtype
        model.graph.insert_before(join, nodes)
        join.replace_input_with(side, nodes[-1].outputs[0])
    return len(places)
