"""ONNX graph → the same graph with plugin nodes of `engines/tensorrt/plugins.py`. Build time only: it needs onnx_ir."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.spec import EngineError
from engines.tensorrt import plugins
from engines.tensorrt.kinds import KINDS
from kernels.aot import specialise as sites
from kernels.aot.artefact import KernelError
from kernels.aot.specialise import Tensor

SWAP = (0, 2, 1, 3)  # tokens and heads
Fits = Callable[[str, Sequence[Tensor], str], bool]


def rewritten(onnx: Path, inputs: Mapping[str, Sequence[int]], kinds: Collection[str],
              arch: int, fits: Fits | None = None) -> tuple[bytes, dict[str, dict[str, int]]]:
    """ONNX file `onnx` at the static shapes `inputs`, with plugin nodes at its sites of `kinds` ("attention", "norm").

    Returns the model, whose weights stay where they are (in it, or in files beside `onnx`), and for each of `kinds` how
    many sites became plugin nodes and how many did not, because our kernels cannot do them. fits: tells that the kernel
    of a node exists for `arch`. Raises EngineError without onnx_ir.
    """
    try:
        import onnx_ir as ir
    except ImportError as e:
        raise EngineError("putting plugins into a graph needs onnx_ir, which is missing; run: pip install onnx-ir") \
            from e
    model = ir.load(onnx)
    counts = rewrite(model, inputs, kinds, arch, fits)
    return ir.to_proto(model).SerializeToString(), counts


def rewrite(model: Any, inputs: Mapping[str, Sequence[int]], kinds: Collection[str], arch: int,
            fits: Fits | None = None) -> dict[str, dict[str, int]]:
    """`rewritten` in place, of an onnx_ir model."""
    from onnx_ir.passes import common

    _fix(model, inputs)
    counts = {}
    for kind in sorted(kinds):
        nodes = [n for n in model.graph if (n.domain, n.op_type) == ("", KINDS[kind])]
        put = _attention if kind == "attention" else _group_norm
        done = sum(put(model.graph, node, arch, fits) for node in nodes)
        counts[kind] = {"ours": done, "vendor": len(nodes) - done}
    if any(count["ours"] for count in counts.values()):
        model.opset_imports[plugins.DOMAIN] = 1
        common.RemoveUnusedNodesPass()(model)
    return counts


def _fix(model: Any, inputs: Mapping[str, Sequence[int]]) -> None:
    """Give the graph's inputs these shapes, and every value the one that follows from them. Weights stay as they are.

    ONNX infers none for GroupNormalization; InstanceNormalization, whose output has its input's shape too, stands in.
    """
    import onnx_ir as ir
    import onnxscript.optimizer
    from onnx_ir.passes import common

    for value in model.graph.inputs:
        value.shape = ir.Shape(inputs[value.name])
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    weights = {value for value in model.graph.initializers.values() if value.dtype.is_floating_point()}
    norms = [node for node in model.graph if (node.domain, node.op_type) == ("", "GroupNormalization")]
    for node in norms:
        node.op_type = "InstanceNormalization"
    onnxscript.optimizer.fold_constants(
        model, should_fold=lambda node: None if weights.isdisjoint(node.inputs) else False)
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    for node in norms:
        node.op_type = "GroupNormalization"


def _attention(graph: Any, node: Any, arch: int, fits: Fits | None) -> bool:
    """Put our attention in the place of `node`, where it can do the same; returns whether it did.

    before   q, k, v ─▶ Transpose ─▶ Attention ─▶ Transpose ─▶ …
    after    q, k, v ─▶ latentrt::attention ─▶ …          it reads and writes [batch, tokens, heads, head dim]

    An Attention without these Transposes gets its own, a three-dimensional one Reshapes.
    """
    values, heads = node.inputs[:3], _attribute(node, "q_num_heads", 0)
    shapes = [_shape(value) for value in values]
    if (any(value is not None for value in node.inputs[3:]) or _attribute(node, "softcap", 0.0)
            or any(value.uses() or value.is_graph_output() for value in node.outputs[1:])
            or node.outputs[0].is_graph_output()
            or heads != _attribute(node, "kv_num_heads", 0) or {*map(len, shapes)} != {3 if heads else 4}):
        return False
    split = [(s[0], s[1], heads, s[2] // heads) if heads else (s[0], s[2], s[1], s[3]) for s in shapes]
    tensors = [Tensor(shape, _dtype(value)) for shape, value in zip(split, values, strict=True)]
    site = _json(scale=_attribute(node, "scale", None), causal=bool(_attribute(node, "is_causal", 0)))
    if not _possible("attention", tensors, site, arch, fits):
        return False
    new = _Nodes(graph, node)
    inputs = [new.reshape(value, shape) if heads else value.producer().inputs[0] if _is_swap(value.producer())
              else new.add("Transpose", [value], perm=SWAP) for value, shape in zip(values, split, strict=True)]
    out, last = new.plugin("attention", inputs, site), node.outputs[0]
    users = [use.node for use in last.uses()]
    if heads:
        out = new.reshape(out, (*split[0][:2], math.prod(split[0][2:])))
    elif len(users) == 1 and _is_swap(users[0]) and not users[0].outputs[0].is_graph_output():
        last = users[0].outputs[0]
    else:
        out = new.add("Transpose", [out], perm=SWAP)
    new.replace(last, out)
    return True


def _group_norm(graph: Any, node: Any, arch: int, fits: Fits | None) -> bool:
    """Put our group norm, with the SiLU that may follow, in the place of `node`; returns whether it did.

    before   x ─▶ GroupNormalization ─▶ Sigmoid, Mul ─▶ …
    after    x ─▶ latentrt::group_norm ─▶ …
    or       x ─▶ latentrt::group_norm_statistics ─▶ latentrt::group_norm_normalise(x, …) ─▶ …
    """
    shapes = [_shape(value) for value in node.inputs]
    tensors = [Tensor(shape, _dtype(value)) for shape, value in zip(shapes, node.inputs, strict=True)]
    if node.outputs[0].is_graph_output() or len(shapes[0]) < 3:
        return False
    silu = _silu(node.outputs[0])
    last = silu or node.outputs[0]
    settings = {"groups": _attribute(node, "num_groups", None), "eps": _attribute(node, "epsilon", 1e-5),
                "silu": silu is not None,
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

    def __init__(self, graph: Any, node: Any) -> None:
        self._graph, self._node = graph, node

    def add(self, op: str, inputs: Sequence[Any], domain: str = "", **attributes: Any) -> Any:
        """A node before the old one; returns its output."""
        import onnx_ir as ir

        new = ir.node(op, list(inputs), attributes, domain=domain)
        self._graph.insert_before(self._node, new)
        return new.outputs[0]

    def reshape(self, value: Any, shape: Sequence[int]) -> Any:
        return self.add("Reshape", [value, self.add("Constant", [], value_ints=list(shape))])

    def plugin(self, name: str, inputs: Sequence[Any], site: str) -> Any:
        return self.add(name, inputs, plugins.DOMAIN, plugin_namespace=plugins.DOMAIN, plugin_version="1", aot=1,
                        site=site)

    def replace(self, old: Any, new: Any) -> None:
        import onnx_ir as ir

        new.dtype, new.shape = old.dtype, old.shape
        ir.convenience.replace_all_uses_with(old, new)


def _possible(name: str, tensors: Sequence[Tensor], site: str, arch: int, fits: Fits | None) -> bool:
    try:
        plugins.launches(name, tensors, site, arch)
    except KernelError:
        return False
    return fits is None or fits(name, tensors, site)


def _silu(value: Any) -> Any:
    """The output of value · sigmoid(value) where nothing else reads `value`, and it is no output of the graph."""
    users = {use.node.op_type: use.node for use in value.uses()}
    if len(value.uses()) != 2 or set(users) != {"Sigmoid", "Mul"}:
        return None
    sigmoid, product = users["Sigmoid"].outputs[0], users["Mul"].outputs[0]
    found = len(sigmoid.uses()) == 1 and sigmoid in users["Mul"].inputs and not sigmoid.is_graph_output()
    return product if found and not product.is_graph_output() else None


def _is_swap(node: Any) -> bool:
    return node is not None and node.op_type == "Transpose" and tuple(_attribute(node, "perm", ())) == SWAP


def _attribute(node: Any, name: str, default: Any) -> Any:
    return node.attributes[name].value if name in node.attributes else default


def _shape(value: Any) -> tuple[int, ...]:
    """Empty where it is not known in full."""
    known = value is not None and value.shape is not None and value.shape.is_static()
    return tuple(value.shape.numpy()) if known else ()


def _dtype(value: Any) -> str:
    return {"FLOAT16": "fp16", "BFLOAT16": "bf16", "FLOAT": "fp32"}.get(getattr(value.dtype, "name", ""), "unknown")


def _json(**settings: Any) -> str:
    return json.dumps(settings, sort_keys=True, separators=(",", ":"))
