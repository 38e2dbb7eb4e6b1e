"""Latents to the bytes of a picture, where the decoder runs."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.devices.bound import BoundEngine
from runtime.devices.device import signature


class Decoder:
    """A bound VAE decoder of one row, followed by `to_image`: one upload, one graph, one download of bytes."""

    def __init__(self, vae: BoundEngine) -> None:
        self._vae = vae
        rows, _, height, width = vae.buffers["image"].shape
        self._picture = vae.device.zeros((rows, height, width, 3), np.uint8)
        self._to_image = vae.device.kernel("to_image", x=vae.buffers["image"], out=self._picture)
        self._key = (vae.key, signature({"picture": self._picture}))

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        """float32 [rows, C, h, w] to uint8 [rows, height, width, 3]."""
        device = self._vae.device
        device.use()
        device.upload(self._vae.buffers["latents"], latents)
        device.run(self._key, self._enqueue)
        return device.download(self._picture)()

    def _enqueue(self, stream: Any) -> None:
        self._vae.enqueue(stream)
        self._to_image(stream)
