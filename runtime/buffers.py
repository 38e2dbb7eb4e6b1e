"""An engine together with the arrays it reads and writes, allocated once."""

from __future__ import annotations

import numpy as np

from engines import Engine


class BoundEngine:
    """`engine` bound to `buffers`: numpy arrays by tensor name, zero at first, at addresses that never change."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.buffers: dict[str, np.ndarray] = {
            name: np.zeros(tuple(int(d) for d in spec.shape), spec.dtype)
            for name, spec in {**engine.inputs, **engine.outputs}.items()}
        engine.bind(self.buffers)

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Copy `inputs` in, run, and return the output buffers (overwritten by the next call)."""
        for name, value in inputs.items():
            self.buffers[name][...] = value
        self.engine.enqueue()
        return {name: self.buffers[name] for name in self.engine.outputs}
