"""A 16-bit graph in float32."""

from __future__ import annotations

from typing import Any


def widen(ov: Any, model: Any) -> None:
    """Make a 16-bit graph compute in float32: every conversion to 16 bits, and every 16-bit weight, gives float32.

        before   x ─▶ Convert(f16) ─▶ MatMul(w: f16) ─▶ …
        after    x ─▶ Convert(f32) ─▶ MatMul(w: f16 ─▶ Convert(f32)) ─▶ …
    """
    opset = ov.opset13
    for op in model.get_ordered_ops():
        if not op.get_output_size() or op.get_output_element_type(0).to_string() not in ("f16", "bf16"):
            continue
        if op.get_type_name() == "Convert":
            op.output(0).replace(opset.convert(op.input_value(0), "f32").output(0))
        elif op.get_type_name() == "Constant":
            users = list(op.output(0).get_target_inputs())
            wide = opset.convert(op, "f32")
            for user in users:
                user.replace_source_output(wide.output(0))
    model.validate_nodes_and_infer_types()
