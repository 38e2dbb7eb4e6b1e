"""What a task decides: how the latents of an image start. Text to image: from noise, or from latents given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from engines.bundle import Manifest
from runtime.denoise import Job
from runtime.noise import Generator
from runtime.request import Request
from runtime.schedulers import Table, make_table
from runtime.step import initial_state
from runtime.unet import UNet


def table_of(request: Request, manifest: Manifest) -> Table:
    """The solver table of a request: the checkpoint's own scheduler unless the request names another."""
    steps = None if request.timesteps is not None else request.steps
    return make_table(manifest.scheduler, steps, scheduler=request.scheduler, eta=request.eta,
                      timesteps=request.timesteps)


def text_to_image(requests: Sequence[Request], texts: Sequence[np.ndarray], manifest: Manifest,
                  unet: UNet) -> Iterator[Job]:
    """The jobs of `requests`, all with height, width and seed set; texts[i] is float32 [2, tokens, width]."""
    latent = manifest.latent
    for index, (request, text) in enumerate(zip(requests, texts, strict=True)):
        assert request.height and request.width and request.seed is not None
        shape = (latent.channels, request.height // latent.factor, request.width // latent.factor)
        table = table_of(request, manifest)
        given = unet.text(text), unet.time(table.timesteps)
        for image in range(request.count):
            noise = Generator(request.seed + image)
            start = noise.randn(shape) if request.latents is None else request.latents[image]
            yield Job(request, index, image, *given, table, noise, initial_state(table, start))
