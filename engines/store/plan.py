"""The engines that the runtime needs of a bundle: of which graphs, and with how many rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engines.backend import backend
from engines.bundle import Bundle, Component
from engines.spec import EngineConfig


def plan(bundle: Bundle, name: str, *, sizes: Sequence[tuple[int, int]] = (), batches: Sequence[int] = (1,),
         dtype: str = "fp32", components: Sequence[str] = (), **rest: Any) -> list[tuple[str, EngineConfig]]:
    """Return (component, config) of every engine that is needed for pictures of `sizes`, each once.

    name: of the backend. sizes: (height, width) in pixels; the bundle's own by default. batches: images drawn together.
    dtype: "auto" is what the backend prefers on this machine, and on a GPU that of the graph. components: all that the
    runtime uses by default. rest: as of `Bundle.config`. Raises ValueError for a size that the model cannot draw.
    """
    module = backend(name)
    jobs: list[tuple[str, EngineConfig]] = []
    for size in sizes or (bundle.manifest.default_size,):
        bundle.check_size(*size)
        for graph in components or used(bundle, name):
            component = bundle.component(graph)
            computes = dtype if dtype != "auto" else component.dtype if module.on_gpu else module.dtypes()[0]
            for rows in sorted({rows for batch in batches for rows in component.row_counts(batch)}):
                config = bundle.config(graph, backend=name, size=size, batch=rows, dtype=computes, **rest)
                if (graph, config) not in jobs:
                    jobs.append((graph, config))
    return jobs


def used(bundle: Bundle, name: str) -> list[str]:
    """Return the components that the runtime runs with backend `name`.

    A variant is among them where other networks of the bundle give all that it takes beside what its plain graph does,
    as ControlNets do; others, such as the graph for videos, are built when they are named or first used.
    """
    given = {(c.network, spec.group) for c in bundle.manifest.components.values() for spec in c.outputs}

    def fed(component: Component) -> bool:
        more = component.groups - bundle.graph(component.network, component.part)[1].groups
        others = {group for network, group in given if network != component.network}
        return not component.variant or more <= others

    return [graph for graph, component in bundle.manifest.components.items()
            if in_parts(bundle, name, component.network) == bool(component.part) and fed(component)]


def in_parts(bundle: Bundle, name: str, network: str = "") -> bool:
    """Return whether the runtime runs a network, the denoiser by default, in its parts with this backend, or whole."""
    graphs = bundle.graphs(network or bundle.denoiser).values()
    return backend(name).in_parts and any(component.part == "body" for component in graphs)
