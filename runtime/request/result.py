"""The result of a request."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from PIL import Image

from runtime.request.request import Request


@dataclass(frozen=True)
class Result:
    """The pictures of one request.

    request: as it was run, with size and seed filled in. images: PIL, empty for output="latent" or when cancelled.
    latents: float32 [count, C, h, w] before decoding. timings: seconds in "text", "denoise", "decode" and "total" of
    the call, which its requests share. cancelled: on_step returned False. withheld: images that the safety checker kept
    back, which are black. rate, names: of a video, frames a second, and the names of the pictures in its folder if it
    came from one, as `runtime.pictures.video.write` takes them.
    """

    request: Request
    images: tuple[Image.Image, ...]
    latents: np.ndarray
    timings: dict[str, float]
    cancelled: bool = False
    withheld: tuple[int, ...] = ()
    rate: float | None = None
    names: tuple[str, ...] = ()

    def request_of(self, image: int) -> Request:
        """Return the request that makes just this image again, or the whole video that it is a frame of."""
        if self.request.frames is not None:
            return self.request
        latents = None if self.request.latents is None else self.request.latents[image]
        begun_with = self.request.image
        if isinstance(begun_with, np.ndarray) and begun_with.ndim == 4:  # latents, one for each image
            begun_with = begun_with[image]
        assert self.request.seed is not None
        return dataclasses.replace(self.request, seed=self.request.seed + image, count=1, latents=latents,
                                   image=begun_with)
