"""Kernel sites of a graph, and of the module that it was traced from."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir
from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention_processor import Attention
from torch import nn
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention

from export.errors import ExportError
from export.trace.traced_module import TracedModule

SITES = ("Attention", "GroupNormalization", "LayerNormalization", "Gelu")
"""Operators that must stay single nodes: each is a place where a kernel can be put."""


def count_sites(graph: ir.Graph) -> dict[str, int]:
    """Count the operators of SITES in a graph, those that it has."""
    nodes = Counter(node.op_type for node in graph if node.domain == "")
    return {site: nodes[site] for site in SITES if nodes[site]}


def check_sites(graph: ir.Graph, module: TracedModule) -> None:
    """Raise ExportError unless a graph has one node for each module that computes an operator of SITES."""
    nodes = Counter(count_sites(graph))
    modules = Counter(site for part in module.used.modules() if (site := site_of(part)))
    for site in SITES:
        if nodes[site] != modules[site]:
            raise ExportError(f"{module.source}: the graph has {nodes[site]} {site} nodes, the model {modules[site]} "
                              "such modules; this version of PyTorch or diffusers computes it in another way")


def site_of(module: nn.Module) -> str | None:
    """Return the operator that one module becomes, None for a module that is none or contains others."""
    if isinstance(module, Attention | CLIPAttention):
        return "Attention"
    if isinstance(module, nn.GroupNorm):
        return "GroupNormalization"
    if isinstance(module, nn.LayerNorm):
        return "LayerNormalization"
    if isinstance(module, GEGLU | GELU) or (isinstance(module, CLIPMLP) and module.config.hidden_act == "gelu"):
        return "Gelu"
    return None
