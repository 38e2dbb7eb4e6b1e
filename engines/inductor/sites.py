"""Operators that more than one kernel computes: linear layers, norms, GEGLU and attention, PyTorch's way or ours.

`Run.either` takes one of the two; `engines/inductor/choice.py` times both on what a `Site` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from engines.inductor import fp8 as inductor_fp8
from engines.inductor.nodes import Node
from engines.spec import EngineError

if TYPE_CHECKING:
    from engines.inductor.module import Run


@dataclass(frozen=True)
class Site:
    """What two kernels compute the same of: kind, shapes of its tensors, and its other arguments by name.

    Equal sites of a graph are one.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    arguments: tuple[tuple[str, Any], ...]


@dataclass
class Both:
    """The two ways to compute a site, functions of its tensors and arguments; their strides; how often it is there."""

    ours: Callable[..., torch.Tensor]
    theirs: Callable[..., torch.Tensor]
    strides: tuple[tuple[int, ...], ...]
    count: int = 0


def linear(run: Run, node: Node) -> tuple[torch.Tensor, ...]:
    names, biases = node.attributes["weights"], node.attributes["biases"]
    x, weight, bias = run.tensor(node.inputs[0]), run.parameter(names), run.parameter(biases) if biases else None
    run.module.rows[names] = min(x.numel() // x.shape[-1], run.module.rows.get(names, x.numel()))
    if run.module.fp8:
        run.module.used["linear", "fp8" if names in run.module.fp8 else "torch"] += 1
    if names in run.module.fp8:
        y = run.cast(inductor_fp8.linear(x, weight, run.scales(names)))
        y = y if bias is None else y + run.cast(bias)
    else:
        y = F.linear(x, run.cast(weight), bias if bias is None else run.cast(bias))
    return (y,) if len(names) == 1 else y.split([run.module.graph.shape(name)[0] for name in names], -1)


def group_norm(run: Run, node: Node) -> torch.Tensor:
    x, weight, bias = (run.tensor(name) for name in node.inputs)
    groups = node.attributes["num_groups"]
    return run.either("group_norm", run.module.native or x.shape[1] // groups <= 4096,
                      _native_group_norm if run.module.native else _our_group_norm, _torch_group_norm,
                      x, weight, bias, groups=groups, eps=node.attributes.get("epsilon", 1e-5),
                      silu="silu" in node.attributes)


def _our_group_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float,
                    silu: bool) -> torch.Tensor:
    return torch.ops.latentrt.group_norm(_dense(x), weight, bias, groups, eps, silu)


def _native_group_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float,
                       silu: bool) -> torch.Tensor:
    return torch.ops.latentrt.cpu_group_norm(_dense(x), weight, bias, groups, eps, silu)


def _torch_group_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float,
                      silu: bool) -> torch.Tensor:
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if silu else y


def layer_norm(run: Run, node: Node) -> torch.Tensor:
    x, weight, *bias = (run.tensor(name) for name in node.inputs if name)
    axis, eps = node.attributes.get("axis", -1), node.attributes.get("epsilon", 1e-5)
    fits = not run.module.native and axis in (-1, x.dim() - 1) and bool(bias) and x.shape[-1] <= 16384
    return run.either("layer_norm", fits, _our_layer_norm, _torch_layer_norm, x, weight, *bias, axis=axis, eps=eps)


def _our_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, axis: int, eps: float) -> torch.Tensor:
    return torch.ops.latentrt.layer_norm(x.contiguous(), weight, bias, eps)


def _torch_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, axis: int,
                      eps: float) -> torch.Tensor:
    return F.layer_norm(x, x.shape[axis:], weight, bias, eps)


def geglu(run: Run, node: Node) -> torch.Tensor:
    x, axis = run.tensor(node.inputs[0]), node.attributes["axis"]
    return run.either("geglu", not run.module.native and axis in (-1, x.dim() - 1), _our_geglu, _torch_geglu, x,
                      axis=axis)


def _our_geglu(x: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.ops.latentrt.geglu(x.contiguous())


def _torch_geglu(x: torch.Tensor, axis: int) -> torch.Tensor:
    value, gate = x.chunk(2, axis)
    return value * F.gelu(gate)


def attention(run: Run, node: Node) -> torch.Tensor:
    a = node.attributes
    if a.get("softcap", 0.0) or a.get("qk_matmul_output_mode", 0) or any(node.inputs[4:]) or len(node.outputs) > 1:
        raise EngineError(f"inductor: got an Attention with {dict(a)} of {len(node.inputs)} inputs, expected one "
                          "without cache, softcap or a second output; use another backend")
    q, k, v = (run.tensor(name) for name in node.inputs[:3])
    flat = q.dim() == 3
    if flat:
        heads = (a["q_num_heads"], a["kv_num_heads"], a["kv_num_heads"])
        q, k, v = (x.unflatten(2, (n, -1)).transpose(1, 2) for x, n in zip((q, k, v), heads, strict=True))
    mask, causal = node.inputs[3] if len(node.inputs) > 3 else "", bool(a.get("is_causal", 0))
    if mask and not causal and _is_causal(run.constant(mask), q.shape[2], k.shape[2]):
        mask, causal = "", True
    same = q.shape[:2] == k.shape[:2] and k.shape == v.shape and q.shape[3] == k.shape[3]
    size = q.shape[3]
    sizes = size % 8 == 0 and size <= 1024 if run.module.native else 16 <= size <= 256 or size == 512
    fits = not mask and same and sizes and (not causal or q.shape[2] == k.shape[2])
    masked = (run.tensor(mask),) if mask else ()
    y = run.either("attention", fits, _native_attention if run.module.native else _our_attention, _torch_attention,
                   q, k, v, *masked, scale=a.get("scale"), causal=causal)
    return y.transpose(1, 2).flatten(2) if flat else y


def _our_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None,
                   causal: bool) -> torch.Tensor:
    rows = (_rows(x.transpose(1, 2)) for x in (q, k, v))
    return torch.ops.latentrt.attention(*rows, scale=scale, causal=causal).transpose(1, 2)


def _native_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None,
                      causal: bool) -> torch.Tensor:
    rows = (_rows(x.transpose(1, 2)) for x in (q, k, v))
    return torch.ops.latentrt.cpu_attention(*rows, scale=scale, causal=causal).transpose(1, 2)


def _torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, *,
                     scale: float | None, causal: bool) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale,
                                          enable_gqa=q.shape[1] != k.shape[1])


def _is_causal(mask: np.ndarray | None, queries: int, keys: int) -> bool:
    """Whether a known mask says that query i sees the keys up to i."""
    return mask is not None and mask.dtype == bool and queries == keys and mask.shape[-2:] == (queries, keys) and bool(
        (mask == np.tri(queries, dtype=bool)).all())


def _rows(x: torch.Tensor) -> torch.Tensor:
    """As our attention reads it: any strides but the last."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _dense(x: torch.Tensor) -> torch.Tensor:
    """As our group norm reads it: channels first or channels last."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()
