"""The networks of a bundle, with the engines that run them: what tasks and the loop ask for."""

from __future__ import annotations

from typing import cast

from runtime.devices.bound import BoundEngine
from runtime.loop.job import Place
from runtime.lora.application import Stack
from runtime.networks.denoiser import Denoiser
from runtime.networks.first_stage import FirstStage
from runtime.networks.shelf import Shelf
from runtime.text.encoders import TextEncoders


class Networks:
    """Text encoders, denoiser, ControlNets and first stage on one shelf."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self.text = TextEncoders(shelf)
        self.first_stage = FirstStage(shelf)

    def denoiser_of(self, stack: Stack = ()) -> Denoiser:
        """Return the denoiser with the weights of a stack of LoRAs."""
        return Denoiser(self.shelf, stack=stack)

    def net_of(self, name: str, stack: Stack = ()) -> Denoiser:
        """Return an attached ControlNet."""
        return Denoiser(self.shelf, self.shelf.bundle.label(name), stack)

    def denoiser(self, place: Place, rows: int, variant: str) -> BoundEngine:
        """Return the engine of a step, as `runtime.loop.lane.Engines` has it."""
        return self.denoiser_of(_stack(place)).step(place.size, rows, variant, tokens=place.tokens)

    def net(self, name: str, place: Place, rows: int) -> BoundEngine:
        """Return the engine of a ControlNet, as `runtime.loop.lane.Engines` has it."""
        return self.net_of(name, _stack(place)).step(place.size, rows, tokens=place.tokens)


def _stack(place: Place) -> Stack:
    return cast(Stack, place.weights)
