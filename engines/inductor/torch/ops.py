"""Operators as PyTorch computes them: what is traced. Each is a function of the run and a node."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F

from engines.inductor.passes import DOMAIN
from engines.inductor.torch import sites
from engines.inductor.torch.known import KNOWN, dtype_name
from engines.inductor.torch.run import Run
from engines.onnx.patterns import argument, attribute, attributes, is_op
from engines.spec import EngineError


def step(run: Run, node: ir.Node) -> None:
    """Compute the outputs of `node`, in numpy where everything that it reads is known.

    Raises EngineError for an operator that is in no table, or a variant of one that is not covered.
    """
    run.wide = node.outputs[0] in run.angles
    known = [run.constant(value) for value in node.inputs if value is not None]
    table = OURS if node.domain == DOMAIN else OPS
    if is_op(node, "Shape"):
        shape = np.array(run.values[node.inputs[0]].shape, np.int64)
        result: Any = shape[attribute(node, "start", 0):attribute(node, "end")]
    elif table is OPS and node.op_type in KNOWN and all(value is not None for value in known):
        result = np.asarray(KNOWN[node.op_type](node, *known))
    elif node.op_type in table:
        result = table[node.op_type](run, node)
    else:
        raise EngineError(f"inductor: got operator {node.op_type} in the graph, expected one of "
                          f"{', '.join(sorted(OPS))}; use another backend")
    outputs = result if isinstance(result, list | tuple) else (result,)
    run.values.update(zip(node.outputs, outputs, strict=True))


def _known(run: Run, node: ir.Node, at: int) -> np.ndarray | None:
    """Return the input of that number, which has to be known; None where the node leaves it out."""
    value = argument(node, at)
    return None if value is None else run.known(value)


def _axes(run: Run, node: ir.Node) -> list[int]:
    """Return the axes of a Squeeze or Unsqueeze; none where the graph leaves them to the sizes."""
    axes = _known(run, node, 1)
    return list(attribute(node, "axes", ())) if axes is None else [int(axis) for axis in axes.reshape(-1)]


def _reshape(run: Run, node: ir.Node) -> torch.Tensor:
    x, shape = run.tensor(node.inputs[0]), [int(n) for n in run.known(node.inputs[1])]
    if not attribute(node, "allowzero", 0):
        shape = [x.shape[axis] if n == 0 else n for axis, n in enumerate(shape)]
    return x.reshape(shape)


def _unsqueeze(run: Run, node: ir.Node) -> torch.Tensor:
    x, axes = run.tensor(node.inputs[0]), _axes(run, node)
    for axis in sorted(axis % (x.dim() + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _squeeze(run: Run, node: ir.Node) -> torch.Tensor:
    x, axes = run.tensor(node.inputs[0]), _axes(run, node)
    return x.squeeze(tuple(axes)) if axes else x.squeeze()


def _slice(run: Run, node: ir.Node) -> torch.Tensor:
    x = run.tensor(node.inputs[0])
    starts, ends = run.known(node.inputs[1]), run.known(node.inputs[2])
    axes, steps = _known(run, node, 3), _known(run, node, 4)
    axes = np.arange(len(starts)) if axes is None else axes
    steps = np.ones(len(starts), np.int64) if steps is None else steps
    for start, end, axis, stride in zip(starts, ends, axes, steps, strict=True):
        if stride < 1:
            raise EngineError(f"inductor: got a Slice with step {stride}, expected at least 1; use another backend")
        x = torch.ops.aten.slice(x, int(axis), int(start), int(end), int(stride))
    return x


def _split(run: Run, node: ir.Node) -> tuple[torch.Tensor, ...]:
    x, axis, sizes = run.tensor(node.inputs[0]), attribute(node, "axis", 0), _known(run, node, 1)
    if sizes is not None:
        return x.split([int(n) for n in sizes], axis)
    return x.split(math.ceil(x.shape[axis] / len(node.outputs)), axis)


def _gather(run: Run, node: ir.Node) -> torch.Tensor:
    x, axis, index = run.tensor(node.inputs[0]), attribute(node, "axis", 0), run.constant(node.inputs[1])
    if index is not None and index.ndim == 0:
        return x.select(axis, int(index))
    where = run.tensor(node.inputs[1]) if index is None else run.buffer(index)
    if axis == 0 and x.dim() == 2:
        return F.embedding(where, x)
    axis %= x.dim()
    return x.index_select(axis, where.reshape(-1)).reshape(*x.shape[:axis], *where.shape, *x.shape[axis + 1:])


def _gather_nd(run: Run, node: ir.Node) -> torch.Tensor:
    x, index = _tensors(run, node)
    if attribute(node, "batch_dims", 0):
        raise EngineError(f"inductor: got a GatherND {attributes(node)}, expected no batch_dims; use another backend")
    return x[index.unbind(-1)]


def _cast(run: Run, node: ir.Node) -> torch.Tensor:
    """Cast; between floating-point types the module's own rule decides (`Run.cast`)."""
    x, name = run.tensor(node.inputs[0]), dtype_name(attribute(node, "to"))
    if name.startswith(("float", "bfloat")):
        return run.cast(x if x.is_floating_point() else x.float())
    return x.to(getattr(torch, name))


def _clip(run: Run, node: ir.Node) -> torch.Tensor:
    limits = (_known(run, node, 1), _known(run, node, 2))
    return run.tensor(node.inputs[0]).clamp(*(None if limit is None else limit.item() for limit in limits))


def _resize(run: Run, node: ir.Node) -> torch.Tensor:
    """Repeat nearest neighbours; half_pixel rounds as asymmetric does where a picture grows by whole factors."""
    x, a = run.tensor(node.inputs[0]), attributes(node)
    sizes = _known(run, node, 3)
    if sizes is not None:
        size = [int(n) for n in sizes]
    else:
        size = [math.floor(n * float(scale)) for n, scale in zip(x.shape, run.known(node.inputs[2]), strict=True)]
    how = (a.get("coordinate_transformation_mode", "half_pixel"), a.get("nearest_mode", "round_prefer_floor"))
    whole = all(new % old == 0 for new, old in zip(size, x.shape, strict=True))
    if (a.get("mode", "nearest") != "nearest" or tuple(size[:2]) != tuple(x.shape[:2])
            or not (how == ("asymmetric", "floor") or (whole and how == ("half_pixel", "round_prefer_floor")))):
        raise EngineError(f"inductor: got a Resize {a}, expected nearest neighbours; use another backend")
    return F.interpolate(x, size=size[2:], mode="nearest")


def _tensors(run: Run, node: ir.Node) -> list[torch.Tensor]:
    """Return the inputs of an operator that takes no number for a tensor of one value, as the bias of one channel."""
    known = [(value, run.constant(value)) for value in node.inputs if value is not None]
    return [run.tensor(value) if now is None else run.buffer(now) for value, now in known]


def _conv(run: Run, node: ir.Node) -> torch.Tensor:
    x, weight, *bias = _tensors(run, node)
    a, spatial = attributes(node), weight.dim() - 2
    pads = a.get("pads", [0] * 2 * spatial)
    if a.get("auto_pad", "NOTSET") != "NOTSET" or spatial not in (1, 2, 3):
        raise EngineError(f"inductor: got a Conv {a}, expected explicit pads; use another backend")
    before, after = list(pads[:spatial]), list(pads[spatial:])
    if before != after:
        x = F.pad(x, [n for pair in zip(before[::-1], after[::-1], strict=True) for n in pair])
        before = [0] * spatial
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    conv = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    return conv(x, weight, bias[0] if bias else None, a.get("strides", 1), before, a.get("dilations", 1),
                a.get("group", 1))


def _conv_transpose(run: Run, node: ir.Node) -> torch.Tensor:
    x, weight, *bias = _tensors(run, node)
    a, spatial = attributes(node), weight.dim() - 2
    pads = a.get("pads", [0] * 2 * spatial)
    if (a.get("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in a or spatial not in (1, 2, 3)
            or pads[:spatial] != pads[spatial:]):
        raise EngineError(f"inductor: got a ConvTranspose {a}, expected the same explicit pads on both sides; "
                          "use another backend")
    conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
    return conv(x, weight, bias[0] if bias else None, a.get("strides", 1), list(pads[:spatial]),
                a.get("output_padding", 0), a.get("group", 1), a.get("dilations", 1))


def _pad(run: Run, node: ir.Node) -> torch.Tensor:
    """Pad with zeros."""
    x, pads, mode = run.tensor(node.inputs[0]), run.known(node.inputs[1]), attribute(node, "mode", "constant")
    value = _known(run, node, 2)
    if mode != "constant" or argument(node, 3) is not None or (value is not None and value.any()):
        raise EngineError(f"inductor: got a Pad of mode {mode} with {len(node.inputs)} inputs, expected zeros around "
                          "all dimensions; use another backend")
    sides = zip(pads[:x.dim()][::-1], pads[x.dim():][::-1], strict=True)
    return F.pad(x, [int(n) for side in sides for n in side])


def _reduce_sum(run: Run, node: ir.Node) -> torch.Tensor:
    x, axes = run.tensor(node.inputs[0]), _known(run, node, 1)
    return x.sum(list(range(x.dim())) if axes is None else [int(axis) for axis in axes],
                 keepdim=bool(attribute(node, "keepdims", 1)))


def _gemm(run: Run, node: ir.Node) -> torch.Tensor:
    a, (left, right, *bias) = attributes(node), [run.tensor(value) for value in node.inputs if value is not None]
    product = (left.t() if a.get("transA") else left) @ (right.t() if a.get("transB") else right)
    product = product * a["alpha"] if a.get("alpha", 1.0) != 1 else product
    return product + (bias[0] * a["beta"] if a.get("beta", 1.0) != 1 else bias[0]) if bias else product


def _of(function: Callable[..., torch.Tensor]) -> Callable[[Run, ir.Node], torch.Tensor]:
    """Return an operator whose inputs are all tensors or numbers, and that has no attributes."""
    return lambda run, node: function(*(run.tensor(value) for value in node.inputs))


OPS: dict[str, Callable[[Run, ir.Node], Any]] = {
    "Add": _of(operator.add), "Sub": _of(operator.sub), "Mul": _of(operator.mul), "Div": _of(operator.truediv),
    "Pow": _of(operator.pow), "MatMul": _of(operator.matmul), "Neg": _of(operator.neg),
    "Identity": _of(lambda x: x), "Sigmoid": _of(torch.sigmoid), "Sin": _of(torch.sin), "Cos": _of(torch.cos),
    "Exp": _of(torch.exp), "Sqrt": _of(torch.sqrt), "Tanh": _of(torch.tanh), "Erf": _of(torch.erf),
    "Where": _of(torch.where), "Greater": _of(torch.gt), "Relu": _of(torch.relu),
    "ArgMin": lambda run, node: run.tensor(node.inputs[0]).argmin(
        attribute(node, "axis", 0), keepdim=bool(attribute(node, "keepdims", 1))),
    "ArgMax": lambda run, node: run.tensor(node.inputs[0]).argmax(
        attribute(node, "axis", 0), keepdim=bool(attribute(node, "keepdims", 1))),
    "Equal": _of(torch.eq), "Max": lambda run, node: functools.reduce(torch.maximum, _tensors(run, node)),
    "GatherND": _gather_nd, "ConvTranspose": _conv_transpose, "Pad": _pad, "ReduceSum": _reduce_sum,
    "Gelu": lambda run, node: F.gelu(run.tensor(node.inputs[0]),
                                     approximate=attribute(node, "approximate", "none")),
    "Swish": lambda run, node: (x := run.tensor(node.inputs[0])) * torch.sigmoid(x * attribute(node, "alpha", 1.0)),
    "Softmax": lambda run, node: run.tensor(node.inputs[0]).softmax(attribute(node, "axis", -1)),
    "Transpose": lambda run, node: run.tensor(node.inputs[0]).permute(attribute(node, "perm")),
    "Concat": lambda run, node: torch.cat([run.tensor(value) for value in node.inputs], attribute(node, "axis")),
    "Expand": lambda run, node: (x := run.tensor(node.inputs[0])).expand(
        np.broadcast_shapes(x.shape, tuple(int(n) for n in run.known(node.inputs[1])))),
    "Reshape": _reshape, "Unsqueeze": _unsqueeze, "Squeeze": _squeeze, "Slice": _slice, "Split": _split,
    "Gather": _gather, "Cast": _cast, "Clip": _clip, "Resize": _resize, "Conv": _conv, "Gemm": _gemm,
    "GroupNormalization": sites.group_norm, "LayerNormalization": sites.layer_norm, "Attention": sites.attention}
"""Operator of ONNX's own → what computes it."""
OURS: dict[str, Callable[[Run, ir.Node], Any]] = {
    "Linear": sites.linear, "GroupNormSilu": sites.group_norm, "Geglu": sites.geglu}
"""Operator that `engines.inductor.passes` puts into a graph → what computes it."""
