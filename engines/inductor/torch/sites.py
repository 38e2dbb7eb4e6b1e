"""Operators that more than one kernel computes: linear layers, norms, GEGLU and attention, PyTorch's way or ours.

`Run.either` takes one of the two; `engines/inductor/torch/choice.py` times both on what a `Site` says.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F

from engines.inductor.passes import linear_biases, linear_weights
from engines.inductor.torch import fp8
from engines.inductor.torch.parameters import names_of
from engines.inductor.torch.run import Run
from engines.onnx.patterns import argument, attribute, attributes, shape
from engines.spec import EngineError


def register(cpp: bool) -> None:
    """Let torch.ops.latentrt have our kernels: those in C++, for CPUs, or in Triton."""
    if cpp:
        import kernels.cpu.torch_ops
    else:
        import kernels.triton.attention
        import kernels.triton.geglu
        import kernels.triton.group_norm
        import kernels.triton.layer_norm  # noqa: F401


def linear(run: Run, node: ir.Node) -> tuple[torch.Tensor, ...]:
    weights, settings = linear_weights(node), run.settings
    names, biases = names_of(weights), names_of(linear_biases(node))
    x, weight, bias = run.tensor(node.inputs[0]), run.parameter(names), run.parameter(biases) if biases else None
    run.survey.rows[names] = min(x.numel() // x.shape[-1], run.survey.rows.get(names, x.numel()))
    if settings.fp8:
        run.survey.used["linear", "fp8" if names in settings.fp8 else "vendor"] += 1
    if names in settings.fp8:
        y = run.cast(fp8.linear(x, weight, run.scales(names)))
        y = y if bias is None else y + run.cast(bias)
    else:
        y = F.linear(x, run.cast(weight), bias if bias is None else run.cast(bias))
    return (y,) if len(names) == 1 else y.split([shape(value)[0] for value in weights], -1)


def group_norm(run: Run, node: ir.Node) -> torch.Tensor:
    """Compute GroupNormalization, or GroupNormSilu of `engines.inductor.passes`."""
    x, weight, bias = (run.tensor(value) for value in node.inputs)
    groups, cpp = attribute(node, "num_groups"), run.settings.cpp
    return run.either("norm", cpp or x.shape[1] // groups <= 4096, _cpp_group_norm if cpp else _triton_group_norm,
                      _torch_group_norm, x, weight, bias, groups=groups, eps=attribute(node, "epsilon", 1e-5),
                      silu=node.op_type == "GroupNormSilu")


def _triton_group_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float,
                       silu: bool) -> torch.Tensor:
    return torch.ops.latentrt.group_norm(_dense(x), weight, bias, groups, eps, silu)


def _cpp_group_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float,
                    silu: bool) -> torch.Tensor:
    return torch.ops.latentrt.cpu_group_norm(_dense(x), weight, bias, groups, eps, silu)


def _torch_group_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float,
                      silu: bool) -> torch.Tensor:
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if silu else y


def layer_norm(run: Run, node: ir.Node) -> torch.Tensor:
    x, weight, *bias = (run.tensor(value) for value in node.inputs if value is not None)
    axis, eps = attribute(node, "axis", -1), attribute(node, "epsilon", 1e-5)
    fits = not run.settings.cpp and axis in (-1, x.dim() - 1) and bool(bias) and x.shape[-1] <= 16384
    return run.either("layer_norm", fits, _triton_layer_norm, _torch_layer_norm, x, weight, *bias, axis=axis, eps=eps)


def _triton_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, axis: int,
                       eps: float) -> torch.Tensor:
    return torch.ops.latentrt.layer_norm(x.contiguous(), weight, bias, eps)


def _torch_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, axis: int,
                      eps: float) -> torch.Tensor:
    return F.layer_norm(x, x.shape[axis:], weight, bias, eps)


def geglu(run: Run, node: ir.Node) -> torch.Tensor:
    x, axis = run.tensor(node.inputs[0]), attribute(node, "axis")
    return run.either("geglu", not run.settings.cpp and axis in (-1, x.dim() - 1), _triton_geglu, _torch_geglu, x,
                      axis=axis)


def _triton_geglu(x: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.ops.latentrt.geglu(x.contiguous())


def _torch_geglu(x: torch.Tensor, axis: int) -> torch.Tensor:
    value, gate = x.chunk(2, axis)
    return value * F.gelu(gate)


def attention(run: Run, node: ir.Node) -> torch.Tensor:
    a, cpp = attributes(node), run.settings.cpp
    if (a.get("softcap", 0.0) or a.get("qk_matmul_output_mode", 0) or len(node.outputs) > 1
            or any(value is not None for value in node.inputs[4:])):
        raise EngineError(f"inductor: got an Attention with {a} of {len(node.inputs)} inputs, expected one "
                          "without cache, softcap or a second output; use another backend")
    q, k, v = (run.tensor(value) for value in node.inputs[:3])
    flat = q.dim() == 3
    if flat:
        heads = (a["q_num_heads"], a["kv_num_heads"], a["kv_num_heads"])
        q, k, v = (x.unflatten(2, (n, -1)).transpose(1, 2) for x, n in zip((q, k, v), heads, strict=True))
    mask, causal = argument(node, 3), bool(a.get("is_causal", 0))
    if mask is not None and not causal and _is_causal(run.constant(mask), q.shape[2], k.shape[2]):
        mask, causal = None, True
    same = q.shape[:2] == k.shape[:2] and k.shape == v.shape and q.shape[3] == k.shape[3]
    size = q.shape[3]
    sizes = size % 8 == 0 and size <= 1024 if cpp else 16 <= size <= 256 or size == 512
    fits = mask is None and same and sizes and (not causal or q.shape[2] == k.shape[2])
    masked = () if mask is None else (run.tensor(mask),)
    y = run.either("attention", fits, _cpp_attention if cpp else _triton_attention, _torch_attention, q, k, v, *masked,
                   scale=a.get("scale"), causal=causal)
    return y.transpose(1, 2).flatten(2) if flat else y


def _triton_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None,
                      causal: bool) -> torch.Tensor:
    rows = (_rows(x.transpose(1, 2)) for x in (q, k, v))
    return torch.ops.latentrt.attention(*rows, scale=scale, causal=causal).transpose(1, 2)


def _cpp_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None,
                   causal: bool) -> torch.Tensor:
    rows = (_rows(x.transpose(1, 2)) for x in (q, k, v))
    return torch.ops.latentrt.cpu_attention(*rows, scale=scale, causal=causal).transpose(1, 2)


def _torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, *,
                     scale: float | None, causal: bool) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale,
                                          enable_gqa=q.shape[1] != k.shape[1])


def _is_causal(mask: np.ndarray | None, queries: int, keys: int) -> bool:
    """Return whether a known mask says that query i sees the keys up to i."""
    return mask is not None and mask.dtype == bool and queries == keys and mask.shape[-2:] == (queries, keys) and bool(
        (mask == np.tri(queries, dtype=bool)).all())


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return `x` as our attention reads it: any strides but the last."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _dense(x: torch.Tensor) -> torch.Tensor:
    """Return `x` as our group norm reads it: channels first or channels last."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()
