"""Prompt to picture: encode the text, denoise the latents, decode them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
from PIL import Image
from tqdm import tqdm

from engines import Bundle
from runtime.config import PipelineConfig
from runtime.loop.job import Job, Place
from runtime.loop.loop import Loop
from runtime.loop.watch import Watch
from runtime.networks.networks import Networks
from runtime.networks.shelf import Shelf
from runtime.request.plan import Plan, plan
from runtime.request.request import Request
from runtime.request.result import Result
from runtime.request.task import blank
from runtime.tasks import Model, jobs, paste
from runtime.text.encoders import Text


class Pipeline:
    """A bundle opened with engines of static shapes, ready to draw.

        pipe = Pipeline.load("sd15.bundle", size=(512, 512))
        pipe(Request("a photograph of an astronaut riding a horse", seed=42)).images[0].save("astronaut.png")

    It may be called from several threads at a time: their images share the loop, and each call gets its own.
    """

    def __init__(self, bundle: Bundle, config: PipelineConfig) -> None:
        """Open engines for settings that `PipelineConfig.chosen` has filled in; see `load`."""
        start = time.perf_counter()
        bundle.verify(bundle.manifest.files)
        self.bundle, self.config = bundle, config
        self.networks = Networks(Shelf(bundle, config))
        self._loop = Loop(self.networks, config.batch)
        self._lock = threading.RLock()  # engines run one at a time
        self._load()
        self.load_seconds = time.perf_counter() - start

    @classmethod
    def load(cls, path: str | Path, backend: str = "auto", **settings: Any) -> Self:
        """Open a bundle and load its engines (building those that are not there yet).

        settings: the fields of `PipelineConfig`, such as size, batch, dtype. Raises EngineError for a bundle or engine
        that cannot be used, ValueError for a size or batch that cannot be, TypeError for an unknown setting.
        """
        bundle = Bundle.open(path)
        return cls(bundle, PipelineConfig(backend, **settings).chosen(bundle)[0])

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
        return self.draw([plan(r, self.bundle, self.config.pixels, self.config.depth_estimator) for r in request])

    def draw(self, plans: Sequence[Plan]) -> list[Result]:
        """Draw requests that `runtime.request.plan.plan` has planned for this bundle, as one batch.

        Raises ValueError for a LoRA that does not fit the model, before anything is computed.
        """
        for planned in plans:
            self.networks.shelf.loras.read(planned.request.loras)
        start = time.perf_counter()
        with self._lock:
            begun = self._begin(plans)
        ready = time.perf_counter()
        self._denoise(begun)
        denoised = time.perf_counter()
        drawn = [[job for job in begun if job.request_index == i] for i in range(len(plans))]
        images, withheld = self._finish(plans, drawn)
        end = time.perf_counter()
        timings = {"text": ready - start, "denoise": denoised - ready, "decode": end - denoised, "total": end - start}
        return [Result(planned.request, tuple(images[i]), np.stack([j.latents for j in drawn[i]]), timings,
                       any(j.cancelled for j in drawn[i]), tuple(withheld[i]), planned.rate, planned.names)
                for i, planned in enumerate(plans)]

    def encode(self, requests: Sequence[Request]) -> list[Text]:
        """Return what the text encoders make of the prompts of each request, without LoRAs.

        Raises ValueError for a weighted prompt or an embedding that cannot be used.
        """
        with self._lock:
            return self.networks.text(requests)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Return the pictures of latents float32 [n, C, h, w]: float32 [n, height, width, 3] in [0, 1]."""
        with self._lock:
            images = [self.networks.first_stage.decode(latent).transpose(1, 2, 0) * 0.5 + 0.5 for latent in latents]
        return np.stack(images).clip(0.0, 1.0)

    def _begin(self, plans: Sequence[Plan]) -> list[Job]:
        """Encode the texts, and what else the steps need, one set of LoRAs after another."""
        begun: list[Job] = []
        for loras in dict.fromkeys(planned.request.loras for planned in plans):
            stack = self.networks.shelf.loras.read(loras)
            members = [i for i, planned in enumerate(plans) if planned.request.loras == loras]
            chosen = [plans[i] for i in members]
            texts = self.networks.text([planned.request for planned in chosen], stack)
            model = Model(self.bundle.manifest, self.networks.denoiser_of(stack), self.networks.first_stage.encode,
                          partial(self.networks.net_of, stack=stack))
            for job in jobs(chosen, [text.inputs for text in texts], model):
                size, tokens = chosen[job.request_index].size, texts[job.request_index].tokens
                job.place = Place(size, tokens, stack)
                job.request_index = members[job.request_index]
                begun.append(job)
        return begun

    def _denoise(self, begun: list[Job]) -> None:
        """Submit the jobs to the loop, and step it until they have ended; other threads' jobs may take part."""
        with self._bar(total=sum(job.table.rows for job in begun), desc="denoise", unit="step") as bar:
            watch = Watch(begun, bar, self.networks.first_stage.picture)
            for job in begun:
                self._loop.submit(job)
            try:
                while not all(job.ended for job in begun):
                    with self._lock:
                        self._loop.step()
            except BaseException:
                watch.cancel()
                raise
        watch.check()

    def _finish(self, plans: Sequence[Plan], drawn: list[list[Job]]) -> tuple[list[list[Image.Image]], list[list[int]]]:
        """Decode the pictures of every request, and say which of them were withheld."""
        images: list[list[Image.Image]] = [[] for _ in drawn]
        withheld: list[list[int]] = [[] for _ in drawn]
        wanted = [job for group in drawn for job in group if job.request.output == "image" and not job.cancelled]
        with self._bar(total=len(wanted), desc="decode", unit="image") as bar:
            for job in wanted:
                with self._lock:
                    image = self.networks.first_stage.picture(job.latents)
                image = paste(plans[job.request_index], image) if job.request.paste else image
                checker = self.config.safety_checker
                if checker is not None and (passed := checker(image)) is not image:
                    if passed is None:
                        withheld[job.request_index].append(job.image)
                    image = passed or Image.new("RGB", image.size)
                images[job.request_index].append(image)
                bar.update()
        return images, withheld

    def _load(self) -> None:
        """Load the engines of one batch of the pipeline's own size, and capture what a GPU repeats."""
        size, rows = self.config.pixels, 2 * self.config.batch
        denoiser, first_stage = self.networks.denoiser_of(), self.networks.first_stage
        loads: list[Callable[[], object]] = [
            self.networks.text.load, lambda: denoiser.load(size, rows), lambda: first_stage.load_decoder(size)]
        if not {"text-to-image", "upscale"} & set(self.bundle.manifest.tasks):
            loads.append(lambda: first_stage.load_encoder(size))
        with self._bar(total=len(loads), desc="load", unit="engine") as bar:
            for load in loads:
                load()
                bar.update()
        if denoiser.step(size, rows).device.captures:
            for _ in range(2):  # libraries set themselves up, and what repeats becomes a graph, the largest batch first
                self._denoise(self._begin([plan(blank(self.bundle.manifest, size), self.bundle, size)]))

    def _bar(self, total: int, desc: str, unit: str) -> tqdm:
        return tqdm(total=total, desc=desc, unit=unit, disable=None if self.config.progress else True, leave=False)
