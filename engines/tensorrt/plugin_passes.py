"""An ONNX graph with plugin nodes of `engines/tensorrt/plugins.py` at its sites. Build time only: it needs onnx_ir."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from engines.onnx import model as onnx_model
from engines.onnx import patterns
from engines.onnx.patterns import SWAP, attribute, is_op, is_swap
from engines.tensorrt import plugins
from engines.tensorrt.options import KINDS
from kernels.aot import specialise as sites
from kernels.aot.artefact import KernelError
from kernels.aot.specialise import Tensor

Fits = Callable[[str, Sequence[Tensor], str], bool]


def rewritten(onnx: Path, inputs: Mapping[str, Sequence[int]], kinds: Collection[str],
              arch: int, fits: Fits | None = None) -> tuple[bytes, dict[str, dict[str, int]]]:
    """ONNX file `onnx` at the static shapes `inputs`, with plugin nodes at its sites of `kinds` ("attention", "norm").

    Return the model, whose weights stay where they are (in it, or in files beside `onnx`), and for each of `kinds` how
    many sites became plugin nodes ("ours") and how many did not ("vendor"), because our kernels cannot do them. fits:
    tells that the kernel of a node exists for `arch`. Raises EngineError for a file that is no model.
    """
    model = onnx_model.read(onnx, "putting plugins into a graph")
    counts = rewrite(model, inputs, kinds, arch, fits)
    return ir.to_proto(model).SerializeToString(), counts


def rewrite(model: ir.Model, inputs: Mapping[str, Sequence[int]], kinds: Collection[str], arch: int,
            fits: Fits | None = None) -> dict[str, dict[str, int]]:
    """Do what `rewritten` does to a model in memory; return how many sites became what."""
    _fix(model, inputs)
    counts = {}
    for kind in sorted(kinds):
        nodes = [node for node in model.graph if is_op(node, KINDS[kind])]
        put = _attention if kind == "attention" else _group_norm
        done = sum(put(model.graph, node, arch, fits) for node in nodes)
        counts[kind] = {"ours": done, "vendor": len(nodes) - done}
    if any(count["ours"] for count in counts.values()):
        model.opset_imports[plugins.DOMAIN] = 1
        common.RemoveUnusedNodesPass()(model)
    return counts


def _fix(model: ir.Model, inputs: Mapping[str, Sequence[int]]) -> None:
    """Give the graph's inputs these shapes, and every value the one that follows from them. Weights stay as they are.

    ONNX infers none for GroupNormalization; InstanceNormalization, whose output has its input's shape too, stands in.
    """
    import onnxscript.optimizer

    for value in model.graph.inputs:
        value.shape = ir.Shape(inputs[value.name])
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    weights = {value for value in model.graph.initializers.values() if value.dtype.is_floating_point()}
    norms = [node for node in model.graph if is_op(node, "GroupNormalization")]
    for node in norms:
        node.op_type = "InstanceNormalization"
    onnxscript.optimizer.fold_constants(
        model, should_fold=lambda node: None if weights.isdisjoint(node.inputs) else False)
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    for node in norms:
        node.op_type = "GroupNormalization"


def _attention(graph: ir.Graph, node: ir.Node, arch: int, fits: Fits | None) -> bool:
    """Put our attention in the place of `node`, where it can do the same; return whether it did.

        before   q, k, v ─▶ Transpose ─▶ Attention ─▶ Transpose ─▶ …
        after    q, k, v ─▶ latentrt::attention ─▶ …          it reads and writes [batch, tokens, heads, head dim]

    An Attention without these Transposes gets its own, a three-dimensional one Reshapes.
    """
    values, heads = node.inputs[:3], attribute(node, "q_num_heads", 0)
    shapes = [patterns.shape(value) for value in values]
    if (any(value is not None for value in node.inputs[3:]) or attribute(node, "softcap", 0.0)
            or any(value.uses() or value.is_graph_output() for value in node.outputs[1:])
            or node.outputs[0].is_graph_output()
            or heads != attribute(node, "kv_num_heads", 0) or {*map(len, shapes)} != {3 if heads else 4}):
        return False
    split = [(s[0], s[1], heads, s[2] // heads) if heads else (s[0], s[2], s[1], s[3]) for s in shapes]
    tensors = [Tensor(shape, patterns.dtype(value)) for shape, value in zip(split, values, strict=True)]
    site = _json(scale=attribute(node, "scale", None), causal=bool(attribute(node, "is_causal", 0)))
    if not _possible("attention", tensors, site, arch, fits):
        return False
    new = _Nodes(graph, node)
    inputs = [new.reshape(value, shape) if heads else value.producer().inputs[0] if is_swap(value.producer())
              else new.add("Transpose", [value], perm=SWAP) for value, shape in zip(values, split, strict=True)]
    out, last = new.plugin("attention", inputs, site), node.outputs[0]
    users = [use.node for use in last.uses()]
    if heads:
        out = new.reshape(out, (*split[0][:2], math.prod(split[0][2:])))
    elif len(users) == 1 and is_swap(users[0]) and not users[0].outputs[0].is_graph_output():
        last = users[0].outputs[0]
    else:
        out = new.add("Transpose", [out], perm=SWAP)
    new.replace(last, out)
    return True


def _group_norm(graph: ir.Graph, node: ir.Node, arch: int, fits: Fits | None) -> bool:
    """Put our group norm, with the SiLU that may follow, in the place of `node`; return whether it did.

        before   x ─▶ GroupNormalization ─▶ Sigmoid, Mul ─▶ …
        after    x ─▶ latentrt::group_norm ─▶ …
        or       x ─▶ latentrt::group_norm_statistics ─▶ latentrt::group_norm_normalise(x, …) ─▶ …
    """
    shapes = [patterns.shape(value) for value in node.inputs]
    tensors = [Tensor(shape, patterns.dtype(value)) for shape, value in zip(shapes, node.inputs, strict=True)]
    if node.outputs[0].is_graph_output() or len(shapes[0]) < 3:
        return False
    end = patterns.silu(node.outputs[0])
    silu = end is not None and not end.outputs[0].is_graph_output()
    last = end.outputs[0] if end is not None and silu else node.outputs[0]
    settings = {"groups": attribute(node, "num_groups", None), "eps": attribute(node, "epsilon", 1e-5),
                "silu": silu,
                "channels_last": tensors[0].dtype != "fp32" and len(shapes[0]) == 4 and shapes[0][1] % 8 == 0}
    try:
        launches = sites.group_norm(tensors[0], tensors[1], tensors[2], arch, **settings)
    except KernelError:
        return False
    new = _Nodes(graph, node)
    settings["affine"] = tensors[1].dtype
    if len(launches) == 1:
        site = _json(**settings)
        if not _possible("group_norm", tensors, site, arch, fits):
            return False
        new.replace(last, new.plugin("group_norm", node.inputs, site))
        return True
    shape = sites.parts_shape(tensors[0], settings["groups"], launches[0])
    site = _json(**settings, parts=shape)
    if not (_possible("group_norm_statistics", tensors[:1], site, arch, fits)
            and _possible("group_norm_normalise", [*tensors, Tensor(shape, "fp32")], site, arch, fits)):
        return False
    parts = new.plugin("group_norm_statistics", node.inputs[:1], site)
    new.replace(last, new.plugin("group_norm_normalise", [*node.inputs, parts], site))
    return True


class _Nodes:
    """New nodes in the place of `node`."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._graph, self._node = graph, node

    def add(self, op: str, inputs: Sequence[ir.Value], domain: str = "", **attributes: Any) -> ir.Value:
        """Put a node before the old one; return its output."""
        new = ir.node(op, list(inputs), attributes, domain=domain)
        self._graph.insert_before(self._node, new)
        return new.outputs[0]

    def reshape(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        return self.add("Reshape", [value, self.add("Constant", [], value_ints=list(shape))])

    def plugin(self, name: str, inputs: Sequence[ir.Value], site: str) -> ir.Value:
        return self.add(name, inputs, plugins.DOMAIN, plugin_namespace=plugins.DOMAIN, plugin_version="1", aot=1,
                        site=site)

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let what reads `old` read `new`."""
        new.dtype, new.shape = old.dtype, old.shape
        ir.convenience.replace_all_uses_with(old, new)


def _possible(name: str, tensors: Sequence[Tensor], site: str, arch: int, fits: Fits | None) -> bool:
    try:
        plugins.launches(name, tensors, site, arch)
    except KernelError:
        return False
    return fits is None or fits(name, tensors, site)


def _json(**settings: Any) -> str:
    return json.dumps(settings, sort_keys=True, separators=(",", ":"))
