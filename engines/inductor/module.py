"""An ONNX graph as a torch module of static shapes, for torch.export to trace.

The module interprets the nodes; tracing leaves only the tensor operators of `OPS`. What depends on shapes and constants
alone is computed in numpy meanwhile, so that no shape arithmetic is left. Floating-point values are of one dtype, but
for the angles of `onnx_nodes.angles`, whatever casts the graph has.
"""

from __future__ import annotations

import functools
import importlib
import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from engines.inductor import fp8 as inductor_fp8
from engines.inductor import nodes as onnx_nodes
from engines.inductor import sites as onnx_sites
from engines.inductor.nodes import Graph, Node
from engines.inductor.sites import Both, Site
from engines.spec import EngineError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}

@dataclass(frozen=True)
class Weight:
    """One parameter: initializers one after the other along the first axis; channels_last: that memory order.

    dtype: a name of DTYPES; one in fp8 has scales beside it, float32 [1, rows], as `inductor_fp8` reads them.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    channels_last: bool

    def empty(self, device: Any) -> torch.Tensor:
        """Memory for it, of strides that depend on nothing but this record."""
        shape = (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])
        memory = torch.channels_last if self.channels_last else torch.contiguous_format
        return torch.empty(shape, dtype=DTYPES[self.dtype], device=device, memory_format=memory)

    def part(self, parameter: torch.Tensor, name: str) -> torch.Tensor:
        """The view of `parameter` that holds one of its initializers."""
        return parameter.narrow(0, *self._rows(name))

    def scales(self, device: Any) -> torch.Tensor:
        """Memory for the scales of a parameter in fp8."""
        return torch.empty((1, sum(shape[0] for shape in self.shapes)), dtype=torch.float32, device=device)

    def write(self, parameter: torch.Tensor, scales: torch.Tensor | None, name: str, values: torch.Tensor) -> None:
        """Give one of its initializers these values, floating-point of its shape; quantised for a parameter in fp8."""
        if scales is None:
            self.part(parameter, name).copy_(values)
            return
        quantised, scale = inductor_fp8.quantise(values.to(parameter.device))
        self.part(parameter, name).copy_(quantised)
        scales.narrow(1, *self._rows(name)).copy_(scale.t())

    def _rows(self, name: str) -> tuple[int, int]:
        """Where one of its initializers begins along the first axis, and how long it is."""
        at = self.names.index(name)
        return sum(shape[0] for shape in self.shapes[:at]), self.shapes[at][0]


def rewrite(graph: Graph, fuse: bool) -> Graph:
    """The graph in the operators of this file; fuse: one product for all that read the same value."""
    graph = onnx_nodes.geglus(onnx_nodes.silus(onnx_nodes.linears(graph)))
    return onnx_nodes.merge_linears(graph) if fuse else graph


class OnnxModule(torch.nn.Module):
    """forward(inputs in the graph's order) → outputs: float32 (or integers) at both ends, `dtype` inside.

    kernels: kinds of `inductor_options.KERNELS` that are ours where they can be; native: those in C++, for CPUs, not in
    Triton. chosen: site → "latentrt" or "torch", where it is not as `kernels` says. fp8: the weights of linear layers
    in float8. weights: name of a buffer → what it holds; `scales_name` is where its scales are in fp8; their memory is
    left as it comes. constants: name of a buffer → values; given None, a run on the meta device finds them, `both` of
    every site that our kernels could do, and the rows of every linear layer's input. used: ("attention", "latentrt")
    and so on → sites, counted when it runs.
    """

    def __init__(self, graph: Graph, dtype: str, device: Any, kernels: frozenset[str],
                 constants: Mapping[str, np.ndarray] | None = None, *, native: bool = False,
                 chosen: Mapping[Site, str] | None = None, fp8: frozenset[tuple[str, ...]] = frozenset()) -> None:
        super().__init__()
        self.graph, self.dtype, self.kernels, self.native, self.fp8 = graph, DTYPES[dtype], kernels, native, fp8
        self.chosen: Mapping[Site, str] = chosen or {}
        self.device = torch.device(device)
        self.angles = onnx_nodes.angles(graph)
        self.weights = _weights(graph, dtype, self.angles, fp8)
        self.constants: dict[str, np.ndarray] = {} if constants is None else dict(constants)
        self.finding = constants is None
        self.both: dict[Site, Both] = {}
        self.rows: dict[tuple[str, ...], int] = {}
        self.used: Counter[tuple[str, str]] = Counter()
        self.parameter_of = {weight.names: name for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            self.register_buffer(name, weight.empty(device))
            if weight.dtype == "fp8":
                self.register_buffer(scales_name(name), weight.scales(device))
        for name, values in self.constants.items():
            self.register_buffer(name, torch.from_numpy(values).to(device))
        for module in ("cpu.torch_ops",) if native else (f"triton.{kind}" for kind in sorted(kernels)):
            importlib.import_module(f"kernels.{module}")  # registers torch.ops.latentrt.…

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        run = Run(self, dict(zip(self.graph.inputs, inputs, strict=True)))
        self.used.clear()
        for node in self.graph.nodes:
            run.step(node)
        outputs = [run.env[name] for name in self.graph.outputs]
        return tuple(x.to(torch.float32 if x.is_floating_point() else x.dtype).contiguous() for x in outputs)


def survey(graph: Graph, shapes: Mapping[str, tuple[tuple[int, ...], str]], dtype: str, kernels: frozenset[str],
           native: bool = False) -> OnnxModule:
    """The module on the meta device after a run on these static shapes (name → shape, numpy dtype).

    Raises EngineError for what the table of operators does not have.
    """
    module = OnnxModule(graph, dtype, "meta", kernels, native=native)
    with torch.no_grad():
        module(*(torch.empty(shape, dtype=getattr(torch, kind), device="meta") for shape, kind in
                 (shapes[name] for name in graph.inputs)))
    return module


def build(found: OnnxModule, dtype: str, device: Any, chosen: Mapping[Site, str] | None = None,
          fp8_least: int | None = None) -> OnnxModule:
    """The module of a `survey` with memory for weights on `device`.

    chosen: as of OnnxModule. fp8_least: linear layers of at least this size compute in float8; None: none does.
    """
    elsewhere = {name for node in found.graph.nodes for name in node.inputs}
    fp8 = frozenset(names for names, rows in found.rows.items() if fp8_least is not None
                    and not elsewhere & set(names) and inductor_fp8.fits(
                        rows, found.graph.shape(names[0])[1], sum(found.graph.shape(n)[0] for n in names), fp8_least))
    return OnnxModule(found.graph, dtype, device, found.kernels, found.constants, native=found.native, chosen=chosen,
                      fp8=fp8)


def scales_name(name: str) -> str:
    """The buffer that holds the scales of parameter `name`."""
    return f"{name}_scales"


class Run:
    """Values of one forward: tensors, and numpy arrays where they are known without any input."""

    def __init__(self, module: OnnxModule, env: dict[str, Any]) -> None:
        self.module, self.env, self.wide = module, env, False

    def step(self, node: Node) -> None:
        known = [self.constant(name) for name in node.inputs if name]
        self.wide = node.outputs[0] in self.module.angles
        if node.op == "Shape":
            shape = np.array(self.env[node.inputs[0]].shape, np.int64)
            result: Any = shape[node.attributes.get("start", 0):node.attributes.get("end")]
        elif node.op in KNOWN and all(value is not None for value in known):
            result = np.asarray(KNOWN[node.op](node, *known))
        elif node.op in OPS:
            result = OPS[node.op](self, node)
        else:
            raise EngineError(f"inductor: got operator {node.op} in the graph, expected one of "
                              f"{', '.join(sorted(OPS))}; use another backend")
        outputs = result if isinstance(result, list | tuple) else (result,)
        self.env.update(zip(node.outputs, outputs, strict=True))

    def constant(self, name: str) -> np.ndarray | None:
        """The value where it is known, else None. Weights are not: they can be given new values."""
        value = self.env.get(name)
        if isinstance(value, np.ndarray):
            return value
        graph = self.module.graph
        return graph.numbers(name) if value is None and name in graph.values and not graph.is_weight(name) else None

    def known(self, name: str) -> np.ndarray:
        """A value that has to be known: a shape, axes, scales."""
        value = self.constant(name)
        if value is None and name in self.module.graph.values:
            value = self.module.graph.numbers(name)
        if value is None:
            raise EngineError(f"inductor: got {name}, which depends on the inputs, expected it to follow from shapes; "
                              "use another backend")
        return value

    def tensor(self, name: str) -> Any:
        """A tensor of the node's dtype, or a Python number."""
        value = self.constant(name)
        if value is not None:
            if value.size == 1 and value.ndim < 2:
                return value.item()
            return self.buffer(value)
        return self.cast(self.env[name] if name in self.env else self.parameter((name,)))

    def cast(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.float32 if self.wide else self.module.dtype
        return x.to(dtype) if x.is_floating_point() and x.dtype != dtype else x

    def parameter(self, names: tuple[str, ...]) -> torch.Tensor:
        return getattr(self.module, self.module.parameter_of[names])

    def buffer(self, values: np.ndarray) -> torch.Tensor:
        """A known array as a buffer of the module; equal ones are one."""
        values = np.array(values, np.float32 if values.dtype.kind == "f" else None)  # a copy, in order
        name = next((n for n, v in self.module.constants.items() if v.dtype == values.dtype
                     and v.shape == values.shape and np.array_equal(v, values)), None)
        if self.module.finding:
            self.module.constants[name or f"c{len(self.module.constants)}"] = values
            x = torch.from_numpy(values).to("meta")
        else:
            x = getattr(self.module, str(name))
        return self.cast(x)

    def scales(self, names: tuple[str, ...]) -> torch.Tensor:
        return getattr(self.module, scales_name(self.module.parameter_of[names]))

    def either(self, kind: str, fits: bool, ours: Callable[..., torch.Tensor], theirs: Callable[..., torch.Tensor],
               *tensors: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """What `ours` or `theirs` makes of the tensors and arguments; fits: ours can. The site is counted."""
        module = self.module
        site = Site(kind, tuple(tuple(x.shape) for x in tensors), tuple(arguments.items()))
        if fits and kind in module.kernels and module.finding:
            both = module.both.setdefault(site, Both(ours, theirs, tuple(x.stride() for x in tensors)))
            both.count += 1
        whose = module.chosen.get(site, "latentrt") if fits and kind in module.kernels else "torch"
        module.used[kind, whose] += 1
        return (ours if whose == "latentrt" else theirs)(*tensors, **arguments)


def _weights(graph: Graph, dtype: str, angles: set[str], fp8: frozenset[tuple[str, ...]]) -> dict[str, Weight]:
    """Every parameter that the graph's operators read, by the name of its buffer."""
    found: dict[tuple[str, ...], Weight] = {}

    def add(names: tuple[str, ...], own: str, last: bool) -> None:
        before = found.get(names)
        shapes = tuple(graph.shape(name) for name in names)
        wide = own == "fp32" or (before is not None and before.dtype == "fp32")
        found[names] = Weight(names, shapes, "fp32" if wide else own, last or bool(before and before.channels_last))

    for node in graph.nodes:
        if node.op == "Linear":
            for names in (node.attributes["weights"], node.attributes["biases"]):
                if names:
                    add(names, "fp8" if names in fp8 else dtype, False)
        native = NATIVE.get(node.op, ())
        for at, name in enumerate(node.inputs):
            if graph.is_weight(name) and at not in native:
                add((name,), "fp32" if node.outputs[0] in angles else dtype,
                    node.op == "Conv" and at == 1 and len(graph.shape(name)) == 4)
    return {f"w{n}": weight for n, weight in enumerate(found.values())}


def _axes(run: Run, node: Node) -> list[int]:
    """Of Squeeze and Unsqueeze; all of size 1 where the graph does not say."""
    if len(node.inputs) > 1 and node.inputs[1]:
        return [int(axis) for axis in run.known(node.inputs[1]).reshape(-1)]
    return list(node.attributes.get("axes", ()))


def _reshape(run: Run, node: Node) -> torch.Tensor:
    x, shape = run.tensor(node.inputs[0]), [int(n) for n in run.known(node.inputs[1])]
    if not node.attributes.get("allowzero", 0):
        shape = [x.shape[axis] if n == 0 else n for axis, n in enumerate(shape)]
    return x.reshape(shape)


def _unsqueeze(run: Run, node: Node) -> torch.Tensor:
    x, axes = run.tensor(node.inputs[0]), _axes(run, node)
    for axis in sorted(axis % (x.dim() + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _squeeze(run: Run, node: Node) -> torch.Tensor:
    x, axes = run.tensor(node.inputs[0]), _axes(run, node)
    return x.squeeze(tuple(axes)) if axes else x.squeeze()


def _slice(run: Run, node: Node) -> torch.Tensor:
    x = run.tensor(node.inputs[0])
    starts, ends = run.known(node.inputs[1]), run.known(node.inputs[2])
    axes = run.known(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] else np.arange(len(starts))
    steps = run.known(node.inputs[4]) if len(node.inputs) > 4 else np.ones(len(starts), np.int64)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 1:
            raise EngineError(f"inductor: got a Slice with step {step}, expected at least 1; use another backend")
        x = torch.ops.aten.slice(x, int(axis), int(start), int(end), int(step))
    return x


def _split(run: Run, node: Node) -> tuple[torch.Tensor, ...]:
    x, axis = run.tensor(node.inputs[0]), node.attributes.get("axis", 0)
    if len(node.inputs) > 1 and node.inputs[1]:
        return x.split([int(n) for n in run.known(node.inputs[1])], axis)
    return x.split(math.ceil(x.shape[axis] / len(node.outputs)), axis)


def _gather(run: Run, node: Node) -> torch.Tensor:
    x, axis, index = run.tensor(node.inputs[0]), node.attributes.get("axis", 0), run.constant(node.inputs[1])
    if index is not None and index.ndim == 0:
        return x.select(axis, int(index))
    where = run.tensor(node.inputs[1]) if index is None else run.buffer(index)
    if axis == 0 and x.dim() == 2:
        return F.embedding(where, x)
    axis %= x.dim()
    return x.index_select(axis, where.reshape(-1)).reshape(*x.shape[:axis], *where.shape, *x.shape[axis + 1:])


def _gather_nd(run: Run, node: Node) -> torch.Tensor:
    x, index = _tensors(run, node)
    if node.attributes.get("batch_dims", 0):
        raise EngineError(f"inductor: got a GatherND {dict(node.attributes)}, expected no batch_dims; use another "
                          "backend")
    return x[index.unbind(-1)]


def _cast(run: Run, node: Node) -> torch.Tensor:
    """Between floating-point types the module's own rule decides; see `Run.cast`."""
    x, name = run.tensor(node.inputs[0]), onnx_nodes.dtype_name(node.attributes["to"])
    if name.startswith(("float", "bfloat")):
        return run.cast(x if x.is_floating_point() else x.float())
    return x.to(getattr(torch, name))


def _clip(run: Run, node: Node) -> torch.Tensor:
    low, high = (run.known(name).item() if name else None for name in (*node.inputs[1:], "", "")[:2])
    return run.tensor(node.inputs[0]).clamp(low, high)


def _resize(run: Run, node: Node) -> torch.Tensor:
    """Nearest neighbours; half_pixel rounds as asymmetric does where a picture grows by whole factors."""
    x, a = run.tensor(node.inputs[0]), node.attributes
    if len(node.inputs) > 3 and node.inputs[3]:
        size = [int(n) for n in run.known(node.inputs[3])]
    else:
        size = [math.floor(n * float(scale)) for n, scale in zip(x.shape, run.known(node.inputs[2]), strict=True)]
    how = (a.get("coordinate_transformation_mode", "half_pixel"), a.get("nearest_mode", "round_prefer_floor"))
    whole = all(new % old == 0 for new, old in zip(size, x.shape, strict=True))
    if (a.get("mode", "nearest") != "nearest" or tuple(size[:2]) != tuple(x.shape[:2])
            or not (how == ("asymmetric", "floor") or (whole and how == ("half_pixel", "round_prefer_floor")))):
        raise EngineError(f"inductor: got a Resize {dict(a)}, expected nearest neighbours; use another backend")
    return F.interpolate(x, size=size[2:], mode="nearest")


def _tensors(run: Run, node: Node) -> list[torch.Tensor]:
    """Inputs of an operator that takes no number for a tensor of one value, such as the bias of one channel."""
    known = [(name, run.constant(name)) for name in node.inputs if name]
    return [run.tensor(name) if value is None else run.buffer(value) for name, value in known]


def _conv(run: Run, node: Node) -> torch.Tensor:
    x, weight, *bias = _tensors(run, node)
    a, spatial = node.attributes, weight.dim() - 2
    pads = a.get("pads", [0] * 2 * spatial)
    if a.get("auto_pad", "NOTSET") != "NOTSET" or spatial not in (1, 2, 3):
        raise EngineError(f"inductor: got a Conv {dict(a)}, expected explicit pads; use another backend")
    before, after = list(pads[:spatial]), list(pads[spatial:])
    if before != after:
        x = F.pad(x, [n for pair in zip(before[::-1], after[::-1], strict=True) for n in pair])
        before = [0] * spatial
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    conv = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    return conv(x, weight, bias[0] if bias else None, a.get("strides", 1), before, a.get("dilations", 1),
                a.get("group", 1))


def _conv_transpose(run: Run, node: Node) -> torch.Tensor:
    x, weight, *bias = _tensors(run, node)
    a, spatial = node.attributes, weight.dim() - 2
    pads = a.get("pads", [0] * 2 * spatial)
    if (a.get("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in a or spatial not in (1, 2, 3)
            or pads[:spatial] != pads[spatial:]):
        raise EngineError(f"inductor: got a ConvTranspose {dict(a)}, expected the same explicit pads on both sides; "
                          "use another backend")
    conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
    return conv(x, weight, bias[0] if bias else None, a.get("strides", 1), list(pads[:spatial]),
                a.get("output_padding", 0), a.get("group", 1), a.get("dilations", 1))


def _pad(run: Run, node: Node) -> torch.Tensor:
    """With zeros."""
    x, pads, mode = run.tensor(node.inputs[0]), run.known(node.inputs[1]), node.attributes.get("mode", "constant")
    value, axes = (*node.inputs[2:], "", "")[:2]
    if mode != "constant" or axes or (value and run.known(value).any()):
        raise EngineError(f"inductor: got a Pad of mode {mode} with inputs {list(node.inputs)}, expected zeros around "
                          "all dimensions; use another backend")
    sides = zip(pads[:x.dim()][::-1], pads[x.dim():][::-1], strict=True)
    return F.pad(x, [int(n) for side in sides for n in side])


def _reduce_sum(run: Run, node: Node) -> torch.Tensor:
    x = run.tensor(node.inputs[0])
    axes = [int(axis) for axis in run.known(node.inputs[1])] if len(node.inputs) > 1 else list(range(x.dim()))
    return x.sum(axes, keepdim=bool(node.attributes.get("keepdims", 1)))


def _gemm(run: Run, node: Node) -> torch.Tensor:
    a, (left, right, *bias) = node.attributes, [run.tensor(name) for name in node.inputs if name]
    product = (left.t() if a.get("transA") else left) @ (right.t() if a.get("transB") else right)
    product = product * a["alpha"] if a.get("alpha", 1.0) != 1 else product
    return product + (bias[0] * a["beta"] if a.get("beta", 1.0) != 1 else bias[0]) if bias else product


def _one(function: Callable[..., torch.Tensor]) -> Callable[[Run, Node], torch.Tensor]:
    """An operator whose inputs are all tensors or numbers, and that has no attributes."""
    return lambda run, node: function(*(run.tensor(name) for name in node.inputs))


OPS: dict[str, Callable[[Run, Node], Any]] = {
    "Add": _one(operator.add), "Sub": _one(operator.sub), "Mul": _one(operator.mul), "Div": _one(operator.truediv),
    "Pow": _one(operator.pow), "MatMul": _one(operator.matmul), "Neg": _one(operator.neg),
    "Identity": _one(lambda x: x), "Sigmoid": _one(torch.sigmoid), "Sin": _one(torch.sin), "Cos": _one(torch.cos),
    "Exp": _one(torch.exp), "Sqrt": _one(torch.sqrt), "Tanh": _one(torch.tanh), "Erf": _one(torch.erf),
    "Where": _one(torch.where), "Greater": _one(torch.gt), "Relu": _one(torch.relu),
    "ArgMin": lambda run, node: run.tensor(node.inputs[0]).argmin(
        node.attributes.get("axis", 0), keepdim=bool(node.attributes.get("keepdims", 1))),
    "ArgMax": lambda run, node: run.tensor(node.inputs[0]).argmax(
        node.attributes.get("axis", 0), keepdim=bool(node.attributes.get("keepdims", 1))),
    "Equal": _one(torch.eq), "Max": lambda run, node: functools.reduce(torch.maximum, _tensors(run, node)),
    "GatherND": _gather_nd, "ConvTranspose": _conv_transpose, "Pad": _pad, "ReduceSum": _reduce_sum,
    "Gelu": lambda run, node: F.gelu(run.tensor(node.inputs[0]),
                                     approximate=node.attributes.get("approximate", "none")),
    "Swish": lambda run, node: (x := run.tensor(node.inputs[0])) * torch.sigmoid(x * node.attributes.get("alpha", 1.0)),
    "Softmax": lambda run, node: run.tensor(node.inputs[0]).softmax(node.attributes.get("axis", -1)),
    "Transpose": lambda run, node: run.tensor(node.inputs[0]).permute(node.attributes["perm"]),
    "Concat": lambda run, node: torch.cat([run.tensor(name) for name in node.inputs], node.attributes["axis"]),
    "Expand": lambda run, node: (x := run.tensor(node.inputs[0])).expand(
        np.broadcast_shapes(x.shape, tuple(int(n) for n in run.known(node.inputs[1])))),
    "Reshape": _reshape, "Unsqueeze": _unsqueeze, "Squeeze": _squeeze, "Slice": _slice, "Split": _split,
    "Gather": _gather, "Cast": _cast, "Clip": _clip, "Resize": _resize, "Conv": _conv, "Gemm": _gemm,
    "Linear": onnx_sites.linear, "GroupNormalization": onnx_sites.group_norm,
    "LayerNormalization": onnx_sites.layer_norm, "Geglu": onnx_sites.geglu, "Attention": onnx_sites.attention}
"""Operator → what computes it."""


def _known_reshape(node: Node, x: np.ndarray, shape: np.ndarray) -> np.ndarray:
    keep = not node.attributes.get("allowzero", 0)
    return x.reshape([x.shape[axis] if n == 0 and keep else int(n) for axis, n in enumerate(shape)])


def _known_squeeze(node: Node, x: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
    return x.squeeze(None if axes is None else tuple(int(axis) for axis in axes))


def _known_cast(node: Node, x: np.ndarray) -> np.ndarray:
    name = onnx_nodes.dtype_name(node.attributes["to"])
    return x.astype(np.float32 if name.startswith(("float", "bfloat")) else name)


def _known_slice(node: Node, x: np.ndarray, starts: np.ndarray, ends: np.ndarray, axes: np.ndarray | None = None,
                 steps: np.ndarray | None = None) -> np.ndarray:
    for n, (start, end) in enumerate(zip(starts, ends, strict=True)):
        cut = [slice(None)] * x.ndim
        cut[n if axes is None else int(axes[n])] = slice(int(start), int(end), 1 if steps is None else int(steps[n]))
        x = x[tuple(cut)]
    return x


KNOWN: dict[str, Callable[..., np.ndarray]] = {
    "Add": lambda node, a, b: a + b, "Sub": lambda node, a, b: a - b, "Mul": lambda node, a, b: a * b,
    "Div": lambda node, a, b: a // b if a.dtype.kind == "i" else a / b, "Neg": lambda node, x: -x,
    "Identity": lambda node, x: x, "Constant": lambda node: onnx_nodes.constant(node),
    "Concat": lambda node, *x: np.concatenate(x, node.attributes["axis"]),
    "Gather": lambda node, x, index: np.take(x, index, node.attributes.get("axis", 0)),
    "Unsqueeze": lambda node, x, axes: np.expand_dims(x, tuple(int(axis) for axis in axes.reshape(-1))),
    "Expand": lambda node, x, shape: np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(int(n) for n in shape))),
    "Transpose": lambda node, x: x.transpose(node.attributes["perm"]), "Squeeze": _known_squeeze,
    "Range": lambda node, first, end, step: first + step * np.arange(math.ceil((end - first) / step),
                                                                     dtype=first.dtype),
    "Reshape": _known_reshape, "Cast": _known_cast, "Slice": _known_slice}
"""Operator → the same in numpy, for shapes and constants."""

NATIVE = {"Reshape": (1,), "Expand": (1,), "Unsqueeze": (1,), "Squeeze": (1,), "Slice": (1, 2, 3, 4), "Split": (1,),
          "Resize": (1, 2, 3), "Clip": (1, 2), "Pad": (1, 2, 3), "ReduceSum": (1,)}
"""Inputs that an operator reads as numbers, not as a tensor."""
