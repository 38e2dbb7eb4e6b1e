"""This pass puts what leads to a sine or cosine into a model of its own."""

from __future__ import annotations

from typing import Any

from engines.openvino.passes.match import inputs_of, nodes


def cut_angles(ov: Any, model: Any) -> Any:
    """Take the sines and cosines of inputs out of `model`; return the model that computes them, None without any.

        before   timestep ─▶ Multiply ─▶ Sin ─▶ MatMul …
        after    timestep ─▶ Multiply ─▶ Sin ─▶ "angle0"  (returned)      "angle0" ─▶ MatMul …  (`model`)
    """
    apart = model.clone()
    results: list[Any] = []
    twins = {op.get_friendly_name(): op for op in apart.get_ordered_ops()}
    used: set[str] = set()
    for op in nodes(model, "Sin", "Cos"):
        twin = twins[op.get_friendly_name()]
        above = inputs_of(twin)
        if any(node.get_type_name() in ("MatMul", "Convolution") for node in above):
            continue
        name = f"angle{len(results)}"
        handed = ov.opset13.parameter(list(op.get_output_shape(0)), op.get_output_element_type(0), name=name)
        handed.output(0).get_tensor().set_names({name})
        op.output(0).replace(handed.output(0))
        model.add_parameters([handed])
        result = ov.opset13.result(twin.output(0))
        twin.output(0).get_tensor().set_names({name})
        results.append(result)
        used |= {node.get_friendly_name() for node in above}
    if not results:
        return None
    left = {node.get_friendly_name() for result in model.get_results() for node in inputs_of(result)}
    for parameter in list(model.get_parameters()):
        if parameter.get_friendly_name() not in left:
            model.remove_parameter(parameter)
    return ov.Model(results, [p for p in apart.get_parameters() if p.get_friendly_name() in used], "angles")
