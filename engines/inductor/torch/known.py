"""Whatever follows from shapes and constants alone is computed in numpy, so that none of it is traced."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from engines.inductor.passes import is_weight
from engines.onnx.patterns import attribute, attributes
from engines.spec import EngineError

READ = {"Reshape": (1,), "Expand": (1,), "Unsqueeze": (1,), "Squeeze": (1,), "Slice": (1, 2, 3, 4), "Split": (1,),
        "Resize": (1, 2, 3), "Clip": (1, 2), "Pad": (1, 2, 3), "ReduceSum": (1,)}
"""Operator → the inputs that it reads as numbers, not as a tensor."""


def numbers(value: ir.Value) -> np.ndarray:
    """Return an initializer as numpy computes with it: floating point as float32."""
    array: np.ndarray = value.const_value.numpy()
    return array.astype(np.float32) if value.dtype.is_floating_point() else array


def fixed(value: ir.Value) -> np.ndarray | None:
    """Return the numbers of an initializer; None for another value, and for a weight, which can be given new values."""
    return numbers(value) if value.is_initializer() and not is_weight(value) else None


def dtype_name(number: int) -> str:
    """Return numpy's name of an ONNX element type, such as "float16" or "int64"; torch has the same names."""
    return str(ir.DataType(number).numpy())


def constant(node: ir.Node) -> np.ndarray:
    """Return the value of a Constant node. Raises EngineError for a kind that graphs of ours do not have."""
    fields = attributes(node)
    for name in ("value", "value_int", "value_ints", "value_float", "value_floats"):
        if name in fields:
            value = fields[name].numpy() if name == "value" else np.array(fields[name])
            return value.astype(np.float32) if value.dtype.kind not in "iub" else value
    raise EngineError(f"inductor: got a Constant with {sorted(fields)}, expected a tensor or numbers; "
                      "use another backend")


def _reshape(node: ir.Node, x: np.ndarray, shape: np.ndarray) -> np.ndarray:
    keep = not attribute(node, "allowzero", 0)
    return x.reshape([x.shape[axis] if n == 0 and keep else int(n) for axis, n in enumerate(shape)])


def _squeeze(node: ir.Node, x: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
    return x.squeeze(None if axes is None else tuple(int(axis) for axis in axes))


def _cast(node: ir.Node, x: np.ndarray) -> np.ndarray:
    name = dtype_name(attribute(node, "to"))
    return x.astype(np.float32 if name.startswith(("float", "bfloat")) else name)


def _slice(node: ir.Node, x: np.ndarray, starts: np.ndarray, ends: np.ndarray, axes: np.ndarray | None = None,
           steps: np.ndarray | None = None) -> np.ndarray:
    for n, (start, end) in enumerate(zip(starts, ends, strict=True)):
        cut = [slice(None)] * x.ndim
        cut[n if axes is None else int(axes[n])] = slice(int(start), int(end), 1 if steps is None else int(steps[n]))
        x = x[tuple(cut)]
    return x


KNOWN: dict[str, Callable[..., np.ndarray]] = {
    "Add": lambda node, a, b: a + b, "Sub": lambda node, a, b: a - b, "Mul": lambda node, a, b: a * b,
    "Div": lambda node, a, b: a // b if a.dtype.kind == "i" else a / b, "Neg": lambda node, x: -x,
    "Identity": lambda node, x: x, "Constant": constant,
    "Concat": lambda node, *x: np.concatenate(x, attribute(node, "axis")),
    "Gather": lambda node, x, index: np.take(x, index, attribute(node, "axis", 0)),
    "Unsqueeze": lambda node, x, axes: np.expand_dims(x, tuple(int(axis) for axis in axes.reshape(-1))),
    "Expand": lambda node, x, shape: np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(int(n) for n in shape))),
    "Transpose": lambda node, x: x.transpose(attribute(node, "perm")), "Squeeze": _squeeze,
    "Range": lambda node, first, end, step: first + step * np.arange(math.ceil((end - first) / step),
                                                                     dtype=first.dtype),
    "Reshape": _reshape, "Cast": _cast, "Slice": _slice}
"""Operator of ONNX's own → a function of the node and what it reads, arrays."""
