"""Prompt to picture: encode the text, denoise the latents, decode them."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import overload

import numpy as np
from PIL import Image
from tqdm import tqdm

import engines
from engines import Bundle
from engines.choice import choose
from runtime.buffers import BoundEngine
from runtime.denoise import Job, denoise
from runtime.images import to_uint8
from runtime.request import Request, Step
from runtime.tasks import table_of, text_to_image
from runtime.text import PromptTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What one request gave.

    request: as it was run, with size and seed filled in. images: PIL, empty for output="latent" or when cancelled.
    latents: float32 [count, C, h, w] before decoding. timings: seconds in "text", "denoise", "decode" and "total" of
    the call (requests of one call share them). cancelled: on_step returned False.
    """

    request: Request
    images: tuple[Image.Image, ...]
    latents: np.ndarray
    timings: dict[str, float]
    cancelled: bool = False

    def request_of(self, image: int) -> Request:
        """The request that makes just this image again."""
        latents = None if self.request.latents is None else self.request.latents[image]
        assert self.request.seed is not None
        return dataclasses.replace(self.request, seed=self.request.seed + image, count=1, latents=latents)


class Pipeline:
    """A bundle opened with engines of static shapes, ready to draw.

        pipe = Pipeline.load("sd15.bundle", size=(512, 512))
        pipe(Request("a photograph of an astronaut riding a horse", seed=42)).images[0].save("astronaut.png")
    """

    def __init__(self, bundle: Bundle, *, backend: str, dtype: str, size: tuple[int, int], batch: int, threads: int,
                 progress: bool) -> None:
        self.bundle = bundle
        self.backend = backend
        self.dtype = dtype
        self.size = size
        self.batch = batch
        self._threads = threads
        self.load_seconds = 0.0
        self._progress = progress
        self._engines: dict[tuple[str, int, int, int], BoundEngine] = {}
        self._tokenizers = [PromptTokenizer(bundle.path, spec) for spec in bundle.manifest.text]

    @classmethod
    def load(cls, path: str | Path, backend: str = "auto", *, dtype: str = "auto", size: tuple[int, int] | None = None,
             batch: int = 1, threads: int = 0, progress: bool = True) -> Pipeline:
        """Open a bundle and load its engines (building those that are not there yet).

        path: the bundle. backend: a name of `engines.BACKENDS`, or "auto". dtype: "fp32", "fp16", "bf16", or "auto"
        for the fastest that the backend runs well here. size: (height, width) pixels; the model's own by default.
        batch: images denoised together. threads: CPU threads, 0 for all cores. progress: bars on a terminal.

        Raises EngineError for a bundle or engine that cannot be used, ValueError for a size or batch that cannot be.
        """
        start = time.perf_counter()
        bundle = Bundle.open(path)
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch: got {batch!r}, expected a whole number of at least 1")
        size = size or bundle.manifest.default_size
        bundle.check_size(*size)
        backend, dtype, *_ = choose(backend, dtype, bundle=bundle, size=size, batch=batch, threads=threads,
                                    device="cpu")
        bundle.verify(bundle.manifest.files)
        pipe = cls(bundle, backend=backend, dtype=dtype, size=size, batch=batch, threads=threads, progress=progress)
        with pipe._bar(total=3, desc="load", unit="engine") as bar:
            for load in (lambda: pipe._engine("text_encoder", 2), lambda: pipe._engine("unet", 2 * batch, *size),
                         lambda: pipe._engine("vae_decoder", 1, *size)):
                load()
                bar.update()
        pipe.load_seconds = time.perf_counter() - start
        return pipe

    @overload
    def __call__(self, request: Request | str) -> Result: ...
    @overload
    def __call__(self, request: Sequence[Request]) -> list[Result]: ...

    def __call__(self, request: Request | str | Sequence[Request]) -> Result | list[Result]:
        """Draw one request, or several as one batch whose members may differ in every option.

        Raises ValueError for an option that this model cannot honour, before anything is computed.
        """
        if isinstance(request, str):
            return self([Request(request)])[0]
        if isinstance(request, Request):
            return self([request])[0]
        requests = [self._resolve(r) for r in request]
        if not requests:
            return []
        start = time.perf_counter()
        texts = self.encode([prompt for r in requests for prompt in (r.negative_prompt, r.prompt)])
        pairs = texts.reshape(len(requests), 2, *texts.shape[1:])
        encoded = time.perf_counter()
        jobs = self._denoise(requests, pairs)
        denoised = time.perf_counter()
        images = self._decode_jobs(requests, jobs)
        end = time.perf_counter()
        timings = {"text": encoded - start, "denoise": denoised - encoded, "decode": end - denoised,
                   "total": end - start}
        return [Result(r, tuple(images[i]), np.stack([j.latents for j in jobs[i]]), timings,
                       any(j.cancelled for j in jobs[i])) for i, r in enumerate(requests)]

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """Text encoder output for one prompt or more, float32 [n, tokens, width]; distinct prompts are encoded once."""
        distinct = list(dict.fromkeys(prompts))
        encoder = self._engine("text_encoder", 2)
        tokenize = self._tokenizers[0]
        encoded: dict[str, np.ndarray] = {}
        for i in range(0, len(distinct), 2):
            pair = (distinct[i:i + 2] * 2)[:2]  # the last of an odd number takes both rows
            states = encoder(input_ids=np.stack([tokenize(p) for p in pair]))["hidden_states"]
            encoded.update(zip(pair, states.copy(), strict=True))
        return np.stack([encoded[p] for p in prompts])

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents float32 [n, C, h, w] to pictures float32 [n, height, width, 3] in [0, 1]."""
        factor = self.bundle.manifest.latent.factor
        decoder = self._engine("vae_decoder", 1, latents.shape[2] * factor, latents.shape[3] * factor)
        images = [decoder(latents=latent[None])["image"][0].transpose(1, 2, 0) * 0.5 + 0.5 for latent in latents]
        return np.stack(images).clip(0.0, 1.0)

    def _denoise(self, requests: list[Request], texts: np.ndarray) -> list[list[Job]]:
        """Run every image of every request to its last step; sizes in turn, for a static shape holds one size."""
        jobs: list[list[Job]] = [[] for _ in requests]
        for job in text_to_image(requests, list(texts), self.bundle.manifest):
            jobs[job.request_index].append(job)
        sizes = dict.fromkeys(_size(r) for r in requests)
        evaluations = sum(job.table.rows for group in jobs for job in group)
        with self._bar(total=evaluations, desc="denoise", unit="step") as bar:
            for size in sizes:
                group = [j for r, images in zip(requests, jobs, strict=True) if _size(r) == size for j in images]
                denoise(partial(self._unet, size), self.batch, group, self._after_step(jobs, bar))
        return jobs

    def _after_step(self, jobs: list[list[Job]], bar: tqdm) -> Callable[[Job], None]:
        def after_step(job: Job) -> None:
            bar.update()
            callback = job.request.on_step
            if callback is not None:
                step = Step(job.image, job.row, job.table.rows, float(job.table.timesteps[job.row - 1]), job.latents,
                            lambda: _pictures(self.decode(job.latents[None]))[0])
                if callback(step) is False:
                    for sibling in jobs[job.request_index]:
                        sibling.cancelled = True
        return after_step

    def _decode_jobs(self, requests: list[Request], jobs: list[list[Job]]) -> list[list[Image.Image]]:
        images: list[list[Image.Image]] = [[] for _ in requests]
        wanted = [j for r, group in zip(requests, jobs, strict=True) if r.output == "image" for j in group
                  if not j.cancelled]
        with self._bar(total=len(wanted), desc="decode", unit="image") as bar:
            for job in wanted:
                images[job.request_index] += _pictures(self.decode(job.latents[None]))
                bar.update()
        return images

    def _unet(self, size: tuple[int, int], rows: int) -> BoundEngine:
        return self._engine("unet", rows, *size)

    def _engine(self, component: str, batch: int, height: int = 0, width: int = 0) -> BoundEngine:
        """The engine of a static shape, loaded (and built, where need be) at its first use and kept."""
        key = (component, batch, height, width)
        if key not in self._engines:
            config = self.bundle.config(component, backend=self.backend, dtype=self.dtype, batch=batch, height=height,
                                        width=width, threads=self._threads)
            start = time.perf_counter()
            self._engines[key] = BoundEngine(engines.load(self.bundle, component, config))
            logger.info("%s %s ready in %.2f s", component, config.dims, time.perf_counter() - start)
        return self._engines[key]

    def _resolve(self, request: Request) -> Request:
        """Fill in size and seed, and refuse what this model cannot do."""
        if not isinstance(request, Request):
            raise ValueError(f"request: got {type(request).__name__}, expected a Request or a list of them")
        height, width = request.height or self.size[0], request.width or self.size[1]
        self.bundle.check_size(height, width)
        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        request = dataclasses.replace(request, height=height, width=width, seed=seed)
        table_of(request, self.bundle.manifest)
        latent = self.bundle.manifest.latent
        shape = (latent.channels, height // latent.factor, width // latent.factor)
        if request.latents is not None and request.latents.shape[1:] != shape:
            raise ValueError(f"latents: got {request.latents.shape[1:]} an image, expected {shape} "
                             f"for {height}x{width}")
        return request

    def _bar(self, total: int, desc: str, unit: str) -> tqdm:
        return tqdm(total=total, desc=desc, unit=unit, disable=None if self._progress else True, leave=False)


def _size(request: Request) -> tuple[int, int]:
    assert request.height and request.width  # `_resolve` filled them in
    return request.height, request.width


def _pictures(images: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(array) for array in to_uint8(images)]
