"""The UNet as one engine, or as three: what depends on the text alone, on the time alone, and the rest."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engines import TIME_ROWS, Bundle
from runtime.buffers import BoundEngine

Inputs = dict[str, np.ndarray]


class UNet:
    """Gives the inputs of a step that can be computed before it, and the engine of the step.

    engine: the bound engine of a component, rows, and height and width in pixels (0 where there are none). parts:
    whether to run the graphs of `export.hoist`, or the whole one, whose text and time are what the model was given.
    """

    def __init__(self, bundle: Bundle, engine: Callable[..., BoundEngine], parts: bool) -> None:
        self._engine = engine
        self._parts = parts
        self._body = "unet_body" if parts else "unet"
        self._inputs = [spec.name for spec in bundle.component(self._body).inputs]

    def load(self, size: tuple[int, int], rows: int) -> None:
        """Load what `rows` rows of pictures of `size` need."""
        if self._parts:
            self._engine("unet_text", 2)
            self._engine("unet_time", TIME_ROWS)
        self.step(size, rows)

    def step(self, size: tuple[int, int], rows: int) -> BoundEngine:
        """The engine that reads sample, text and time, and writes noise_pred."""
        return self._engine(self._body, rows, *size)

    def fixed(self, given: Inputs) -> Inputs:
        """Inputs of the step that stay for a whole request, [2, …] each, negative prompt first; given: what the model
        takes of text and of numbers such as sizes, [2, …] each."""
        if self._parts:
            engine = self._engine("unet_text", 2)
            found = engine(**{name: given[name] for name in engine.engine.inputs})
            given = given | {name: value.copy() for name, value in found.items()}
        return self._wanted(given)

    def time(self, timesteps: np.ndarray) -> Inputs:
        """Inputs of the step that depend on the timestep only, [n, …] each; timesteps: [n]."""
        given = {"timestep": timesteps.astype(np.float32)}
        if self._parts:
            engine, parts = self._engine("unet_time", TIME_ROWS), []
            for start in range(0, len(timesteps), TIME_ROWS):
                chunk = given["timestep"][start:start + TIME_ROWS]
                found = engine(timestep=np.resize(chunk, TIME_ROWS))
                parts.append({name: value[:len(chunk)].copy() for name, value in found.items()})
            given |= {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return self._wanted(given)

    def _wanted(self, given: Inputs) -> Inputs:
        return {name: value for name, value in given.items() if name in self._inputs}
