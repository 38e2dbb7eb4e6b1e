"""The denoiser, or a ControlNet, as one engine or in parts: what depends on the text, what on the time, the rest."""

from __future__ import annotations

import numpy as np

from engines.bundle import Component
from runtime.devices.bound import BoundEngine
from runtime.lora.application import Stack
from runtime.networks.shelf import Shelf

Inputs = dict[str, np.ndarray]


class Denoiser:
    """A denoiser computes what it can of a step's inputs before it, and has the engine of the step.

    network: that of a ControlNet, or "" for the bundle's denoiser. stack: the LoRAs on its weights. It runs in the
    parts of `export.passes.hoist` where the bundle has them and the backend wants them, or else whole; its text and
    time are then what the model was given.
    """

    def __init__(self, shelf: Shelf, network: str = "", stack: Stack = ()) -> None:
        self._shelf, self._stack = shelf, stack
        self._network = network or shelf.bundle.denoiser
        self._parts = shelf.in_parts(self._network)
        self._inputs = [spec.name for spec in self._graph("body" if self._parts else "")[1].inputs]

    def load(self, size: tuple[int, int], rows: int) -> BoundEngine:
        """Load what `rows` rows of pictures of `size` need; returns the engine of the step."""
        if self._parts:
            self._part("text")
            self._part("time")
        return self.step(size, rows)

    def step(self, size: tuple[int, int], rows: int, variant: str = "", *, tokens: int = 0) -> BoundEngine:
        """Return the engine that reads sample, text and time, and writes noise_pred, or a ControlNet's residuals.

        variant: "control" for one that also adds residuals of ControlNets, "frames" for one that also attends to other
        frames of a video, of a denoiser that has them.
        """
        name, _ = self._graph("body" if self._parts else "", variant)
        return self._shelf.engine(name, rows, size, tokens, self._stack)

    def hint(self, picture: np.ndarray) -> Inputs:
        """Return what a ControlNet makes of its hint, [1, …]; picture: float32 [3, height, width] in [0, 1]."""
        if not self._parts:
            return {"hint": picture[None]}
        height, width = picture.shape[1:]
        found = self._part("hint", (height, width))(hint=picture[None])
        return {name: value.copy() for name, value in found.items()}

    def fixed(self, given: Inputs) -> Inputs:
        """Return the inputs of the step that stay for a whole request, [2, …] each, negative prompt first.

        given: what the model takes of text and of numbers such as sizes, [2, …] each.
        """
        if self._parts:
            text = self._shelf.bundle.manifest.condition("text")
            engine = self._part("text", tokens=given[text.input].shape[1] if text else 0)
            found = engine(**{name: given[name] for name in engine.engine.inputs})
            given = given | {name: value.copy() for name, value in found.items()}
        return self._wanted(given)

    def time(self, timesteps: np.ndarray) -> Inputs:
        """Return the inputs of the step that depend on the timestep only, [n, …] each; timesteps: [n]."""
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

    def _graph(self, part: str, variant: str = "") -> tuple[str, Component]:
        return self._shelf.bundle.graph(self._network, part, variant)

    def _part(self, part: str, size: tuple[int, int] = (0, 0), tokens: int = 0) -> BoundEngine:
        """Return the engine of a part, with the rows that it has."""
        name, component = self._graph(part)
        assert isinstance(component.rows, int)
        return self._shelf.engine(name, component.rows, size, tokens, self._stack)

    def _wanted(self, given: Inputs) -> Inputs:
        return {name: value for name, value in given.items() if name in self._inputs}
