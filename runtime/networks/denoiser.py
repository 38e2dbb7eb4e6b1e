"""The UNet, or a ControlNet, as one engine or in parts: what depends on the text alone, on the time alone, the rest."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engines import Bundle
from engines.bundle import Component
from runtime.devices.bound import BoundEngine

Inputs = dict[str, np.ndarray]


class UNet:
    """Gives the inputs of a step that can be computed before it, and the engine of the step.

    engine: the bound engine of a component, rows, height and width in pixels (0 where there are none), and tokens of
    the text (0: of one prompt). parts: whether to run the graphs of `export.passes.hoist`, or the whole one, whose text and
    time are what the model was given.
    network: "" for the bundle's denoiser, or that of a ControlNet.
    """

    def __init__(self, bundle: Bundle, engine: Callable[..., BoundEngine], parts: bool,
                 network: str = "") -> None:
        self._bundle = bundle
        self._engine = engine
        self._parts = parts
        self._network = network or bundle.denoiser
        self._inputs = [spec.name for spec in self._graph("body" if parts else "")[1].inputs]

    def _graph(self, part: str, variant: str = "") -> tuple[str, Component]:
        return self._bundle.graph(self._network, part, variant)

    def _part(self, part: str, height: int = 0, width: int = 0, *, tokens: int = 0) -> BoundEngine:
        """The engine of a part, with the rows that it has."""
        name, component = self._graph(part)
        return self._engine(name, component.rows, height, width, tokens=tokens)

    def load(self, size: tuple[int, int], rows: int) -> None:
        """Load what `rows` rows of pictures of `size` need."""
        if self._parts:
            self._part("text")
            self._part("time")
        self.step(size, rows)

    def step(self, size: tuple[int, int], rows: int, variant: str = "", *, tokens: int = 0) -> BoundEngine:
        """The engine that reads sample, text and time, and writes noise_pred.

        variant: "control" for one that also adds residuals of ControlNets, "frames" for one that also attends to other
        frames of a video (`export.families.variants`), of a UNet that has them.
        """
        name, _ = self._graph("body" if self._parts else "", variant)
        return self._engine(name, rows, *size, tokens=tokens)

    def hint(self, picture: np.ndarray) -> Inputs:
        """Of a ControlNet: what it makes of its hint, [1, …]; picture: float32 [3, height, width] in [0, 1]."""
        if not self._parts:
            return {"hint": picture[None]}
        found = self._part("hint", *picture.shape[1:])(hint=picture[None])
        return {name: value.copy() for name, value in found.items()}

    def fixed(self, given: Inputs) -> Inputs:
        """Inputs of the step that stay for a whole request, [2, …] each, negative prompt first; given: what the model
        takes of text and of numbers such as sizes, [2, …] each."""
        if self._parts:
            engine = self._part("text", tokens=given["encoder_hidden_states"].shape[1])
            found = engine(**{name: given[name] for name in engine.engine.inputs})
            given = given | {name: value.copy() for name, value in found.items()}
        return self._wanted(given)

    def time(self, timesteps: np.ndarray) -> Inputs:
        """Inputs of the step that depend on the timestep only, [n, …] each; timesteps: [n]."""
        given = {"timestep": timesteps.astype(np.float32)}
        if self._parts:
            engine, parts = self._part("time"), []
            rows = engine.buffers["timestep"].shape[0]
            for start in range(0, len(timesteps), rows):
                chunk = given["timestep"][start:start + rows]
                found = engine(timestep=np.resize(chunk, rows))
                parts.append({name: value[:len(chunk)].copy() for name, value in found.items()})
            given |= {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return self._wanted(given)

    def _wanted(self, given: Inputs) -> Inputs:
        return {name: value for name, value in given.items() if name in self._inputs}
