"""New values for the weights of a graph that has been through the passes of this folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from engines.onnx.initializers import Initializer
from engines.onnx.low_rank import LowRank, Weight
from engines.onnx.low_rank import constant as unchanged
from engines.openvino.passes.bfloat16 import rounded
from engines.openvino.passes.gates import HALF


def replace_weights(ov: Any, model: Any, weights: Mapping[str, Weight], known: Mapping[str, Initializer]) -> set[str]:
    """Put floating-point values in place of the constants named after initializers; return which it found.

        before   w: old ─▶ …          w#half0, w#half1: old ─▶ …
        after    w: new ─▶ …          w#half0, w#half1: halves of new ─▶ …

    A constant keeps its element type: 16 bits are rounded to nearest even. known: the initializers. Raises EngineError
    for values that do not fit one.
    """
    constants: dict[str, list[Any]] = {}
    for op in model.get_ops():
        if op.get_type_name() == "Constant":
            constants.setdefault(op.get_friendly_name().partition(HALF)[0], []).append(op)
    names = set(weights) & set(constants)
    for name in names:
        value = known[name].check(name, weights[name])
        for old in constants[name]:
            new = _like(ov, old, value if isinstance(value, LowRank) else unchanged(value))
            new.set_friendly_name(old.get_friendly_name())
            old.output(0).replace(new.output(0))
    return names


def _like(ov: Any, old: Any, value: LowRank) -> Any:
    """Return a constant of the element type of `old`, and of its half of `value` where it is one."""
    _, half, index = old.get_friendly_name().partition(HALF)
    if half:
        value = value.rows(int(index) * len(value) // 2, (int(index) + 1) * len(value) // 2)
    if (kind := old.get_element_type().to_string()) == "bf16":
        return rounded(ov, value)
    return ov.op.Constant(value.into(np.empty(value.shape, np.float16 if kind == "f16" else np.float32)))  # it copies
