"""PyTorch module → ONNX graph in the standard's own operators, with symbolic sizes and PyTorch's weight names."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir
import onnxscript.optimizer
import onnxscript.rewriter
import torch
from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention_processor import Attention
from onnx_ir.passes import common
from torch import nn
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention

from export.errors import ExportError
from export.families.stable_diffusion import Graph

OPSET = 23

SITES = ("Attention", "GroupNormalization", "LayerNormalization", "Gelu")
"""Operators that must stay single nodes: each is a place where a kernel can be put."""

_STATE = "model."  # the attribute of Graph that every weight's name starts with


def trace(graph: Graph, dims: Mapping[str, int]) -> tuple[ir.Model, dict[str, int]]:
    """Trace `graph` at the sizes `dims`, which stay symbolic; returns the model and its sites (op type → count).

    Weights keep PyTorch's names and layout, so that a LoRA or a refit finds them. Raises ExportError where the exporter
    fails, or an operator of SITES is not one node for each module that computes it.
    """
    model = traced(graph, graph.example(dims, seed=0))
    _check_sites(model, graph)
    return model, count_sites(model.graph)


def traced(graph: Graph, example: Sequence[torch.Tensor]) -> ir.Model:
    """`trace` at the sizes of `example`, of any module: its sites are not counted."""
    shapes = [{i: name for i, name in enumerate(spec.shape) if isinstance(name, str)} for spec in graph.inputs]
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                graph, **graph.call(example, shapes), dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
                input_names=[spec.name for spec in graph.inputs], output_names=[spec.name for spec in graph.outputs])
        except torch.onnx.OnnxExporterError as e:
            raise ExportError(f"{graph.source}: PyTorch could not trace it to ONNX: {e}") from e
        model = program.model
        _simplify(model)
    _rename(model, graph)
    return model


def _simplify(model: ir.Model) -> None:
    """Fold what is constant, except what is computed from weights; merge equal nodes; drop the exporter's notes."""
    weights = {name for name in model.graph.initializers if name.startswith(_STATE)}

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(value is not None and value.name in weights for value in node.inputs) else None

    common.InlinePass()(model)
    for _ in range(2):
        onnxscript.optimizer.fold_constants(model, should_fold=should_fold)
        onnxscript.rewriter.rewrite(model)
    ir.passes.Sequential(  # equal constants are merged before they are lifted among the weights, which stay apart
        common.CommonSubexpressionEliminationPass(), common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.ClearMetadataAndDocStringPass(), common.NameFixPass())(model)


def _rename(model: ir.Model, graph: Graph) -> None:
    """Give inputs and outputs the sizes of their specs, weights their names in the wrapped model.

    The exporter writes sizes as expressions, such as 8*((latent_height - 1)//8) + 8. Between inputs and outputs they
    become unknown; shape inference finds them again when an engine fixes the inputs.
    """
    for node in model.graph:
        for value in node.outputs:
            value.metadata_props.clear()
            if value.shape is not None:
                value.shape = ir.Shape([d if isinstance(d, int) else None for d in value.shape])
    for values, specs in ((model.graph.inputs, graph.inputs), (model.graph.outputs, graph.outputs)):
        for value, spec in zip(values, specs, strict=True):
            value.metadata_props.clear()
            value.name, value.shape = spec.name, ir.Shape(spec.shape)
            if value.dtype is None or value.dtype.numpy() != spec.dtype:
                raise ExportError(f"{graph.source}: traced {spec.name} is {value.dtype}, expected {spec.dtype}")
    for value in list(model.graph.initializers.values()):
        value.metadata_props.clear()
        value.name = str(value.name).removeprefix(_STATE)
    model.graph.name = graph.source
    model.metadata_props.clear()


def count_sites(graph: ir.Graph) -> dict[str, int]:
    """Operators of SITES in a graph → how many."""
    nodes = Counter(node.op_type for node in graph if node.domain == "")
    return {site: nodes[site] for site in SITES if nodes[site]}


def _check_sites(model: ir.Model, graph: Graph) -> None:
    nodes = Counter(count_sites(model.graph))
    modules = Counter(site for module in graph.used.modules() if (site := _site(module)))
    for site in SITES:
        if nodes[site] != modules[site]:
            raise ExportError(f"{graph.source}: the graph has {nodes[site]} {site} nodes, the model {modules[site]} "
                              "such modules; this version of PyTorch or diffusers computes it in another way")


def _site(module: nn.Module) -> str | None:
    """The operator that one module becomes, None for a module that is none or contains others."""
    if isinstance(module, Attention | CLIPAttention):
        return "Attention"
    if isinstance(module, nn.GroupNorm):
        return "GroupNormalization"
    if isinstance(module, nn.LayerNorm):
        return "LayerNormalization"
    if isinstance(module, GEGLU | GELU) or (isinstance(module, CLIPMLP) and module.config.hidden_act == "gelu"):
        return "Gelu"
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of what does not concern the user (torchvision, axis names, its own deprecations)."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
