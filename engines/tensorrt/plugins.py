"""Our Triton kernels as ahead-of-time plugins of TensorRT: which nodes there are, and what each launches.

A plugin node has op type and inputs of PLUGINS, domain DOMAIN, and one string attribute, `site`: its settings in JSON.
(Numbers would do, but TensorRT 10 turns them from arrays into scalars in a way that numpy 2.4 refuses.) The engine then
holds PTX and launch parameters, and needs neither Python nor Triton. A kernel takes its inputs and then its outputs,
nothing else: sizes, scale and epsilon are compiled in (`kernels/aot/specialise.py`), one piece of code a shape.

Written against the Python sources of `tensorrt.plugin` 10.13 and 11.4; has not run on a GPU yet.
"""

from __future__ import annotations

import functools
import inspect
import json
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engines.spec import EngineError
from kernels.aot import specialise as sites
from kernels.aot.artefact import KernelError, arch_for
from kernels.aot.specialise import Code, Tensor
from kernels.aot.variant import Launch

DOMAIN = "latentrt"
DTYPES = {"HALF": "fp16", "BF16": "bf16", "FLOAT": "fp32"}
"""Names of TensorRT's DataType → ours."""

Launches = Callable[[Sequence[Tensor], Mapping[str, Any], int], tuple[Launch, ...]]


@dataclass(frozen=True)
class Plugin:
    """A plugin is a kernel of ours as a node.

    op: its file of `kernels/triton/`. inputs, output: its pointers, in its order.

    launches: of (inputs, settings, architecture), any one of which computes it; the best first. images: the inputs and
    outputs that are pictures [images, channels, height, width], which may lie in channels-last memory.
    """

    op: str
    inputs: tuple[str, ...]
    output: str
    launches: Launches
    images: tuple[str, ...] = ()


def _attention(tensors: Sequence[Tensor], site: Mapping[str, Any], arch: int) -> tuple[Launch, ...]:
    q, k, v = tensors
    return sites.attention(q, k, v, arch, scale=site["scale"], causal=site["causal"])


def _group_norm(number: int, tensors: Sequence[Tensor], site: Mapping[str, Any], arch: int) -> tuple[Launch, ...]:
    """Return the launch of that number of a group norm; negative numbers count from the last."""
    x = tensors[0]
    affine = Tensor((x.shape[1],), site["affine"])
    launches = sites.group_norm(x, affine, affine, arch, groups=site["groups"], eps=site["eps"], silu=site["silu"],
                                channels_last=site["channels_last"])
    return (launches[number],)


PLUGINS = {
    "attention": Plugin("attention", ("q_ptr", "k_ptr", "v_ptr"), "out_ptr", _attention),
    "group_norm": Plugin("group_norm", ("x_ptr", "weight_ptr", "bias_ptr"), "out_ptr",
                         functools.partial(_group_norm, 0), ("x_ptr", "out_ptr")),
    "group_norm_statistics": Plugin("group_norm", ("x_ptr",), "parts_ptr", functools.partial(_group_norm, 0),
                                    ("x_ptr",)),
    "group_norm_normalise": Plugin("group_norm", ("x_ptr", "weight_ptr", "bias_ptr", "parts_ptr"), "out_ptr",
                                   functools.partial(_group_norm, -1), ("x_ptr", "out_ptr")),
}
"""Op type → plugin. A group too large for registers is a node for its statistics and one that normalises."""


def launches(name: str, tensors: Sequence[Tensor], site: str, arch: int) -> tuple[Launch, ...]:
    """Return what node `name` with these inputs may launch. Raises KernelError for a site that its kernel cannot do."""
    return PLUGINS[name].launches(tensors, json.loads(site), arch)


def parts(site: str) -> tuple[int, ...]:
    """Return the shape of the statistics that a split group norm hands from its first node to its second, float32."""
    return tuple(json.loads(site)["parts"])


def code(name: str, tensors: Sequence[Tensor], site: str, arch: int, max_shared: int | None = None) -> Code:
    """Return the kernel of a node and how it is launched, compiled for `arch` or taken from the cache.

    max_shared: the most bytes of shared memory that it may need. Raises KernelError where there is no such kernel.
    """
    plugin = PLUGINS[name]
    inputs = {pointer: tensor.dtype for pointer, tensor in zip(plugin.inputs, tensors, strict=True)}
    outputs = {plugin.output: "fp32" if plugin.output == "parts_ptr" else tensors[0].dtype}
    target = int(arch_for(arch).removeprefix("sm_"))
    return sites.compile_any(plugin.op, launches(name, tensors, site, target), inputs, outputs, target, max_shared)


def layouts(name: str, site: str, dtype: str) -> str:
    """Return the memory formats of inputs and output as `AutoTuneCombination` wants them, commas between.

    HWC8 is channels-last memory whose channels are a multiple of 8, and the 16-bit format of TensorRT's convolutions.
    """
    plugin = PLUGINS[name]
    last = json.loads(site).get("channels_last", False)
    picture = "LINEAR" if not last else "HWC" if dtype == "fp32" else "HWC8"
    return ", ".join(picture if p in plugin.images else "LINEAR" for p in (*plugin.inputs, plugin.output))


def register(trt: Any, plugin: Any, arch: int, max_shared: int | None = None) -> None:
    """Tell TensorRT in this process about PLUGINS, once; plugin: of `engines.tensorrt.vendor.plugin_package`."""
    for name in PLUGINS:
        _register(trt, plugin, name, arch, max_shared)


def _register(trt: Any, plugin: Any, name: str, arch: int, max_shared: int | None) -> None:
    """Register the three functions that `tensorrt.plugin` asks for; it reads signatures, annotations among them."""
    about, desc, node = PLUGINS[name], plugin.TensorDesc, f"{DOMAIN}::{name}"
    names = [pointer.removesuffix("_ptr") for pointer in about.inputs]

    def describe(*inputs: Any, site: str) -> Any:
        if about.output != "parts_ptr":
            return inputs[0].like()
        return plugin.from_shape_expr(parts(site), dtype=trt.DataType.FLOAT)

    def tune(*arguments: Any) -> Any:
        *inputs, site, outputs = arguments
        dtypes = ", ".join("FP32" if t.dtype == trt.DataType.FLOAT else "FP16" if t.dtype == trt.DataType.HALF else
                          t.dtype.name for t in (*inputs, *outputs))
        return [plugin.AutoTuneCombination(dtypes, layouts(name, site, DTYPES[inputs[0].dtype.name]))]

    def implement(*arguments: Any) -> Any:
        *inputs, site, _, _ = arguments
        tensors = [Tensor(tuple(t.shape), DTYPES[t.dtype.name]) for t in inputs]
        try:
            made = code(name, tensors, site, arch, max_shared)
        except KernelError as e:
            raise EngineError(f"plugin {node} of {tensors}: {e}") from e
        (x, y, z), (threads, _, _) = made.grid, made.block
        launch = plugin.KernelLaunchParams(x, y, z, threads, 1, 1, made.shared)
        return made.entry, made.ptx, launch, plugin.SymIntExprs(0)

    one = types.GenericAlias(tuple, (desc,))
    results = types.GenericAlias(tuple, (str, bytes, plugin.KernelLaunchParams, plugin.SymIntExprs))
    plugin.register(node)(_signed(describe, dict.fromkeys(names, desc), {"site": str}, {}, desc))
    plugin.autotune(node)(_signed(tune, dict.fromkeys(names, desc), {"site": str}, {"outputs": one},
                                  list[plugin.AutoTuneCombination]))
    plugin.aot_impl(node)(_signed(implement, dict.fromkeys(names, desc), {"site": str},
                                  {"outputs": one, "tactic": int}, results))


def _signed(function: Callable[..., Any], inputs: Mapping[str, Any], attributes: Mapping[str, Any],
            rest: Mapping[str, Any], returns: Any) -> Callable[..., Any]:
    """Return `function` with the signature that `inspect` is to see: parameter name → annotation."""
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
                  for name, kind in {**inputs, **attributes, **rest}.items()]
    function.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
    return function
