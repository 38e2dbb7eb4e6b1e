"""A graph of bfloat16 in the place of one of float32, its weights rounded to nearest even."""

from __future__ import annotations

from typing import Any

import numpy as np

from engines.onnx.low_rank import LowRank
from engines.onnx.low_rank import constant as unchanged


def narrow(ov: Any, model: Any) -> None:
    """Make a float32 graph one of bfloat16 between its inputs and outputs, which stay float32.

        before   x (f32) ─▶ MatMul(w: f32) ─▶ …                        ─▶ y (f32)
        after    x (f32) ─▶ Convert(bf16) ─▶ MatMul(w: bf16) ─▶ … ─▶ Convert(f32) ─▶ y (f32)

    The plugin computes in bfloat16 either way; but to nodes of ours it gives what their inputs say, and conversions
    before and after every one of them would copy each tensor twice. Weights are rounded here, to nearest even: a
    Convert that the plugin folds cuts their last bits off, which adds a quarter to the error of a UNet. The weight and
    bias of our group norm stay float32.
    """
    for op in model.get_ordered_ops():
        if not op.get_output_size() or op.get_output_element_type(0).to_string() != "f32":
            continue
        users = [user for user in op.output(0).get_target_inputs()
                 if not (user.get_node().get_type_name() == "GroupNormSilu" and user.get_index())]
        if users and (value := _narrow(ov, op)) is not None:
            for user in users:
                user.replace_source_output(value)
    for result in model.get_results():
        source = result.input_value(0)
        names = source.get_tensor().get_names()
        wide = ov.opset13.convert(source, "f32")
        source.get_tensor().set_names(set())
        wide.output(0).get_tensor().set_names(names)
        result.input(0).replace_source_output(wide.output(0))
    model.validate_nodes_and_infer_types()


def rounded(ov: Any, value: LowRank) -> Any:
    """Return a bfloat16 constant, rounded to nearest even; a value that is finite stays so."""
    tensor = ov.Tensor(ov.Type.bf16, ov.Shape(list(value.shape)))
    value.into(tensor.data.view(np.uint16))
    return ov.op.Constant(tensor)


def _narrow(ov: Any, op: Any) -> Any:
    """Return what an input, a weight or a Convert to float32 gives in bfloat16; None for other nodes, which follow."""
    kind = op.get_type_name()
    if kind == "Parameter":
        return ov.opset13.convert(op, "bf16").output(0)
    if (source := _weight(op)) is not None:
        constant = rounded(ov, unchanged(_bits(source)))
        constant.set_friendly_name(source.get_friendly_name())
        return constant.output(0)
    return ov.opset13.convert(op.input_value(0), "bf16").output(0) if kind == "Convert" else None


def _weight(op: Any) -> Any:
    """Return the constant that `op` is, or converts; else None."""
    node = op.input_value(0).get_node() if op.get_type_name() == "Convert" else op
    return node if node.get_type_name() == "Constant" else None


def _bits(constant: Any) -> np.ndarray:
    """Return the values of a constant; numpy has no bfloat16, so OpenVINO gives its bits as float16, here uint16."""
    data = constant.get_data()
    return data.view(np.uint16) if constant.get_output_element_type(0).to_string() == "bf16" else data
