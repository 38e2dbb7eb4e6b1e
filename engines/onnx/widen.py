"""16-bit ONNX graph → the same graph computing in float32. Build time only: it needs onnx_ir."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engines.onnx.model import library, read
from engines.spec import EngineError

PURPOSE = "widening a 16-bit graph to float32"
_TYPE_ATTRIBUTES = ("to", "dtype", "stash_type", "softmax_precision", "output_dtype")
"""Attributes whose number is an element type."""


def widen(source: Path, target: Path) -> int:
    """Write the float32 version of ONNX file `source` as `target`; return how many nodes and weights changed.

        before   weight: float16 ──▶ Conv(float16)          Cast(to=float16)   LayerNormalization(stash_type=float16)
        after    weight: float16 ──▶ Cast ──▶ Conv(float32)  Cast(to=float32)   LayerNormalization(stash_type=float32)

    Weights stay as they are on disk: those in external files are still read from beside `source`, so a widened
    UNet is a few megabytes. Raises EngineError without onnx_ir.
    """
    ir, model = library(PURPOSE), read(source, PURPOSE)
    narrow = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    if model.functions:
        raise EngineError(f"{source}: got a graph with local functions, expected standard operators only")
    changed = 0
    for node in list(model.graph.all_nodes()):
        for name, attr in list(node.attributes.items()):
            if attr.is_ref():
                continue
            if attr.type == ir.AttributeType.INT and name in _TYPE_ATTRIBUTES and attr.value in narrow:
                node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT)
                changed += 1
            elif attr.type == ir.AttributeType.TENSOR and attr.value.dtype in narrow:
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(attr.value.numpy().astype(np.float32)))
                changed += 1
        for value in node.outputs:
            if value.dtype in narrow:
                value.dtype = ir.DataType.FLOAT
    casts = []
    for weight in list(model.graph.initializers.values()):
        if weight.dtype in narrow and weight.uses():
            cast = ir.node("Cast", [weight], attributes={"to": ir.DataType.FLOAT})
            ir.convenience.replace_all_uses_with(weight, cast.outputs[0])
            cast.replace_input_with(0, weight)
            casts.append(cast)
    if casts:
        model.graph.insert_before(model.graph[0], casts)
    ir.save(model, target)
    return changed + len(casts)
