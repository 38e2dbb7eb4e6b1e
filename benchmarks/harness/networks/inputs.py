"""Every contender of one component is given the same inputs and the same shapes."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.harness.turns import Workload
from engines import Bundle, EngineConfig, store
from engines.bundle import resolve_dims


def rows(workload: Workload) -> int:
    """Return the component's batch rows: guidance takes two of a UNet for each picture."""
    return 2 * workload.batch if workload.component == "unet" else workload.batch


def inputs(workload: Workload) -> dict[str, np.ndarray]:
    """Return standard normal float32 inputs by name, the same for every contender.

    The timestep is 601, and time_ids say that nothing was cropped.
    """
    bundle, rng = Bundle.open(workload.bundle), np.random.default_rng(0)
    component, height, width = bundle.component(workload.component), workload.height, workload.width
    given = {"batch": rows(workload), "height": height, "width": width, "sequence": bundle.tokens}
    dims = resolve_dims(component.dims, given, bundle.manifest.dims)
    arrays = {spec.name: rng.standard_normal(spec.resolve(dims).empty().shape).astype(np.float32)
              for spec in component.inputs}
    fixed = {"timestep": [601], "time_ids": [height, width, 0, 0, height, width]}
    for name in fixed.keys() & arrays.keys():
        arrays[name][:] = np.array(fixed[name], np.float32)
    return arrays


def engines_of(workload: Workload, bundle: Bundle, backend: str, dtype: str, *, whole: bool = False,
               **rest: Any) -> dict[str, EngineConfig]:
    """Return latentrt's engines of a workload: component → config, the engine that is timed last.

    A UNet in parts has text and time before it, which run once, as the runtime runs them. whole: not in parts.
    """
    network = bundle.component(workload.component).network
    in_parts = not whole and store.in_parts(bundle, backend, network)
    parts = ("text", "time", "body") if in_parts else ("",)
    names = [bundle.graph(network, part)[0] for part in parts]
    return {name: bundle.config(name, backend=backend, dtype=dtype, batch=rows(workload),
                                size=(workload.height, workload.width), **rest) for name in names}
