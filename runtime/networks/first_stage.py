"""The first stage: pictures to latents and back, whole or in tiles, in the engines of one static shape."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from runtime.devices.bound import BoundEngine
from runtime.devices.device import signature
from runtime.networks.shelf import Shelf
from runtime.pictures import tiles
from runtime.pictures.save import to_uint8


class Encoded(NamedTuple):
    """Latents of a picture as the first stage gives them: mean and standard deviation, float32 [C, h, w]."""

    mean: np.ndarray
    std: np.ndarray


class FirstStage:
    """The encoder and the decoder of a bundle, for pictures of any size that the model has."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf, self._factor, self._tile = shelf, shelf.bundle.manifest.latent.factor, shelf.config.tile
        self._pictures: dict[tuple[int, int], PictureDecoder] = {}

    def load_decoder(self, size: tuple[int, int]) -> BoundEngine:
        """Load and return the decoder for pictures of `size`, (height, width) in pixels."""
        return self._engine("first_stage_decoder", size)

    def load_encoder(self, size: tuple[int, int]) -> BoundEngine:
        """Load and return the encoder for pictures of `size`, (height, width) in pixels."""
        return self._engine("first_stage_encoder", size)

    def encode(self, image: np.ndarray) -> Encoded:
        """Return the latents of a picture, float32 [3, height, width] in [-1, 1]."""
        height, width = image.shape[1:]
        size, encoder = self._at_once(height, width), self.load_encoder((height, width))

        def run(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            found = encoder(image=part[None])
            return found["mean"][0], found["std"][0]

        if size == (height, width):
            return Encoded(*run(image))
        return Encoded(*tiles.encode(image, run, (size[0] // self._factor, size[1] // self._factor), self._factor))

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Return the picture of latents float32 [C, h, w]: float32 [3, height, width], nominally in [-1, 1]."""
        whole = self._pixels(latents)
        size, decoder = self._at_once(*whole), self.load_decoder(whole)

        def run(part: np.ndarray) -> np.ndarray:
            return decoder(latents=part[None])["image"][0]

        return run(latents) if size == whole else tiles.decode(
            latents, run, (size[0] // self._factor, size[1] // self._factor), self._factor)

    def picture(self, latents: np.ndarray) -> Image.Image:
        """Return the picture of latents float32 [C, h, w], converted to bytes where the decoder runs."""
        size = self._pixels(latents)
        if self._at_once(*size) != size:
            return Image.fromarray(to_uint8((self.decode(latents).transpose(1, 2, 0) * 0.5 + 0.5).clip(0.0, 1.0)))
        if size not in self._pictures:
            self._pictures[size] = PictureDecoder(self.load_decoder(size))
        return Image.fromarray(self._pictures[size](latents[None])[0])

    def _engine(self, role: str, size: tuple[int, int]) -> BoundEngine:
        name, _ = self._shelf.bundle.graph(self._shelf.bundle.network(role))
        return self._shelf.engine(name, 1, self._at_once(*size))

    def _pixels(self, latents: np.ndarray) -> tuple[int, int]:
        return latents.shape[1] * self._factor, latents.shape[2] * self._factor

    def _at_once(self, height: int, width: int) -> tuple[int, int]:
        """Return how much of a picture an engine is given at a time, in pixels."""
        return min(height, self._tile or height), min(width, self._tile or width)


class PictureDecoder:
    """A bound decoder of one row, followed by `to_image`: one upload, one graph, one download of bytes."""

    def __init__(self, decoder: BoundEngine) -> None:
        self._decoder = decoder
        rows, _, height, width = decoder.buffers["image"].shape
        self._picture = decoder.device.zeros((rows, height, width, 3), np.uint8)
        self._to_image = decoder.device.kernel("to_image", x=decoder.buffers["image"], out=self._picture)
        self._key = (decoder.key, signature({"picture": self._picture}))

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        """Return the pictures of float32 [rows, C, h, w], uint8 [rows, height, width, 3]."""
        device = self._decoder.device
        device.use()
        device.upload(self._decoder.buffers["latents"], latents)
        device.run(self._key, self._enqueue)
        return device.download(self._picture)()

    def _enqueue(self, stream: Any) -> None:
        self._decoder.enqueue(stream)
        self._to_image(stream)
