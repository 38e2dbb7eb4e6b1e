"""Our C++ kernels as operators of OpenVINO, from the library that is built beside them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from engines.openvino import vendor
from kernels.cpu import library

OPS = {"attention": "Attention", "norm": "GroupNormSilu"}
"""Kind of site → our operator for it."""

Make = Callable[[list[Any], Mapping[str, Any]], Any]
"""Makes a node of one operator from its inputs and attributes."""


@functools.cache
def missing() -> str | None:
    """Return None where our kernels load into this OpenVINO, else what to do."""
    try:
        add_to(vendor.package().Core())
    except library.CpuKernelError as e:
        return str(e)
    except RuntimeError as e:  # built for another version of OpenVINO
        return f"{library.EXTENSION} does not load: {e}; {library.BUILD} --no-build-isolation"
    return None


def add_to(core: Any) -> None:
    """Tell an openvino.Core of our operators, without which it cannot compile a graph that has them."""
    core.add_extension(str(library.openvino_extension()))


def maker(op: str) -> Make:
    """Return what makes nodes of one of OPS."""
    from openvino.utils.node_factory import NodeFactory

    factory = NodeFactory("opset13")
    factory.add_extension(str(library.openvino_extension()))
    return lambda inputs, attributes: factory.create(op, inputs, attributes)


def fingerprint() -> str:
    """Return a hash of the built kernels: others may compute other last bits."""
    return library.fingerprint()
