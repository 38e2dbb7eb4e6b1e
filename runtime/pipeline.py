"""Prompt to picture: encode the text, denoise the latents, decode them."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image
from tqdm import tqdm

import engines
from engines import Bundle, Engine, EngineError, store
from engines.machine.gpu import gpus
from engines.store.choose import choose
from engines.store.runtime_kernels import runtime_kernels
from kernels.aot.artefact import KernelError
from runtime.devices.bound import BoundEngine
from runtime.devices.device import Cuda, Device
from runtime.devices.host import Host
from runtime.loop.denoise import Job, denoise
from runtime.loop.slots import Capacity, Slots
from runtime.lora.application import Lora, Loras
from runtime.networks.decoder import Decoder
from runtime.networks.denoiser import UNet
from runtime.pictures import read as pictures
from runtime.pictures import tiles, video
from runtime.pictures.save import to_uint8
from runtime.request import checks
from runtime.request.request import Request, Step
from runtime.tasks.tasks import Encoded, Model, blank, jobs, paste, resolve, table_of
from runtime.text.encoders import Text, TextEncoders

logger = logging.getLogger(__name__)

SafetyChecker = Callable[[Image.Image], Image.Image | None]
DepthEstimator = Callable[[Image.Image], np.ndarray]


@dataclass(frozen=True)
class Result:
    """What one request gave.

    request: as it was run, with size and seed filled in. images: PIL, empty for output="latent" or when cancelled.
    latents: float32 [count, C, h, w] before decoding. timings: seconds in "text", "denoise", "decode" and "total" of
    the call (its requests with the same LoRAs share them). cancelled: on_step returned False. withheld: images that the
    safety checker kept back, which are black.
    """

    request: Request
    images: tuple[Image.Image, ...]
    latents: np.ndarray
    timings: dict[str, float]
    cancelled: bool = False
    withheld: tuple[int, ...] = ()

    def request_of(self, image: int) -> Request:
        """The request that makes just this image again, or the whole video that it is a frame of."""
        if self.request.frames is not None:
            return self.request
        latents = None if self.request.latents is None else self.request.latents[image]
        given = self.request.image
        if isinstance(given, np.ndarray) and given.ndim == 4:  # latents, one for each image
            given = given[image]
        assert self.request.seed is not None
        return dataclasses.replace(self.request, seed=self.request.seed + image, count=1, latents=latents, image=given)


class Pipeline:
    """A bundle opened with engines of static shapes, ready to draw.

        pipe = Pipeline.load("sd15.bundle", size=(512, 512))
        pipe(Request("a photograph of an astronaut riding a horse", seed=42)).images[0].save("astronaut.png")
    """

    def __init__(self, bundle: Bundle, *, backend: str, dtype: str, device: str, size: tuple[int, int], batch: int,
                 threads: int, eager: bool, progress: bool, tile: int | None, options: Mapping[str, Any] | None,
                 safety_checker: SafetyChecker | None, depth_estimator: DepthEstimator | None) -> None:
        self.bundle = bundle
        self.backend = backend
        self.dtype = dtype
        self.device = device
        self.size = size
        self.batch = batch
        self._threads, self._options = threads, dict(options or {})
        self._tile = tile
        self.load_seconds = 0.0
        self._progress = progress
        self._safety_checker, self._depth_estimator = safety_checker, depth_estimator
        self._host, self._eager = Host(), eager
        self._gpus: dict[int, Cuda] = {}
        self._engines: dict[tuple[str, int, int, int, int], BoundEngine] = {}
        self._decoders: dict[tuple[int, int], Decoder] = {}
        self._slots: dict[tuple[Any, ...], Slots] = {}
        self._unet = UNet(bundle, self._engine, store.in_parts(bundle, backend))
        self._loras = Loras(bundle)
        self._texts = TextEncoders(bundle, self._engine)
        self._nets: dict[str, UNet] = {}
        self._model = Model(bundle.manifest, self._unet, self._encode_picture, self._net)

    @classmethod
    def load(cls, path: str | Path, backend: str = "auto", *, dtype: str = "auto", device: str = "auto",
             size: tuple[int, int] | None = None, batch: int = 1, threads: int = 0, eager: bool = False,
             progress: bool = True, tile: int | None = None, options: Mapping[str, Any] | None = None,
             safety_checker: SafetyChecker | None = None,
             depth_estimator: DepthEstimator | None = None) -> Pipeline:
        """Open a bundle and load its engines (building those that are not there yet).

        path: the bundle. backend: a name of `engines.BACKENDS`, or "auto". dtype: "fp32", "fp16", "bf16", or "auto"
        for the fastest that the backend runs well here; a GPU runs the graph's own. device: "cpu", "cuda:0", or "auto"
        for the one that the backend is for. size: (height, width) pixels; the model's own by default. batch: images
        denoised together. threads: CPU threads, 0 for all cores. eager: no CUDA graphs. progress: bars on a terminal.
        tile: pixels; larger pictures go through the VAE in overlapping tiles of that side, in the memory of one
        (`runtime.pictures.tiles`). options: settings of the backend, such as {"fp8": "linear"}, as `python -m engines build
        --option` takes them.
        safety_checker: sees every finished picture, and returns it or another, or None to withhold it. depth_estimator:
        gives a depth map, [H, W] in any unit, of the picture of a request that has none but needs one.

        Raises EngineError for a bundle or engine that cannot be used, ValueError for a size or batch that cannot be.
        """
        start = time.perf_counter()
        bundle = Bundle.open(path)
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch: got {batch!r}, expected a whole number of at least 1")
        size = size or bundle.manifest.default_size
        bundle.check_size(*size)
        if tile is not None:
            checks.whole("tile", tile, 4 * bundle.manifest.latent.factor, 2**16)
            if tile % bundle.manifest.latent.factor:
                raise ValueError(f"tile: got {tile} pixels, expected a multiple of {bundle.manifest.latent.factor}")
        backend, dtype, device, _ = choose(backend, dtype, device, bundle=bundle, size=size, batch=batch,
                                           threads=threads)
        own = bundle.dtype
        if engines.backend(backend).on_gpu and dtype != own:
            raise EngineError(f"dtype: got {dtype}, expected {own}, that of the graph, which {backend} keeps; "
                              f"export the checkpoint with --dtype {dtype}")
        bundle.verify(bundle.manifest.files)
        pipe = cls(bundle, backend=backend, dtype=dtype, device=device, size=size, batch=batch, threads=threads,
                   eager=eager, progress=progress, tile=tile, options=options, safety_checker=safety_checker,
                   depth_estimator=depth_estimator)
        loads = [pipe._texts.load, lambda: pipe._unet.load(size, 2 * batch),
                 lambda: pipe._engine(bundle.network("first_stage_decoder"), 1, *pipe._tile_of(*size))]
        if not {"text-to-image", "upscale"} & set(bundle.manifest.tasks):
            loads.append(lambda: pipe._engine(bundle.network("first_stage_encoder"), 1, *pipe._tile_of(*size)))
        with pipe._bar(total=len(loads), desc="load", unit="engine") as bar:
            for load in loads:
                load()
                bar.update()
            if pipe._unet.step(size, 2 * batch).device.captures:
                pipe._capture()
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
        groups: dict[tuple[Lora, ...], list[int]] = {}
        for index, r in enumerate(requests):
            groups.setdefault(r.loras, []).append(index)
        results: dict[int, Result] = {}
        try:
            for loras, members in groups.items():
                self._loras.use(loras)
                results |= zip(members, self._draw([requests[i] for i in members]), strict=True)
        finally:
            self._loras.use(())
        return [results[i] for i in range(len(requests))]

    def _draw(self, requests: list[Request]) -> list[Result]:
        """Requests of the LoRAs in use, as one batch."""
        start = time.perf_counter()
        texts = self.encode(requests)
        encoded = time.perf_counter()
        drawn = self._denoise(requests, texts)
        denoised = time.perf_counter()
        images, withheld = self._finish(requests, drawn)
        end = time.perf_counter()
        timings = {"text": encoded - start, "denoise": denoised - encoded, "decode": end - denoised,
                   "total": end - start}
        return [Result(r, tuple(images[i]), np.stack([j.latents for j in drawn[i]]), timings,
                       any(j.cancelled for j in drawn[i]), tuple(withheld[i])) for i, r in enumerate(requests)]

    def encode(self, requests: Sequence[Request]) -> list[Text]:
        """What the text encoders make of the prompts of each request.

        Raises ValueError for a weighted prompt or an embedding that cannot be used.
        """
        return self._texts(requests)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents float32 [n, C, h, w] to pictures float32 [n, height, width, 3] in [0, 1]."""
        images = [self._decode(latent).transpose(1, 2, 0) * 0.5 + 0.5 for latent in latents]
        return np.stack(images).clip(0.0, 1.0)

    def _denoise(self, requests: list[Request], texts: list[Text]) -> list[list[Job]]:
        """Run every image of every request to its last step; static shapes hold one size and one length of text, so
        those in turn."""
        drawn: list[list[Job]] = [[] for _ in requests]
        for job in jobs(requests, [text.inputs for text in texts], self._model):
            drawn[job.request_index].append(job)
        shapes = [(_size(r), text.tokens) for r, text in zip(requests, texts, strict=True)]
        evaluations = sum(job.table.rows for group in drawn for job in group)
        with self._bar(total=evaluations, desc="denoise", unit="step") as bar:
            for size, tokens in dict.fromkeys(shapes):
                group = [j for shape, images in zip(shapes, drawn, strict=True) if shape == (size, tokens)
                         for j in images]
                denoise(partial(self._unet.step, size, tokens=tokens), self._slots_for(size, tokens, group), group,
                        self._after_step(drawn, bar), partial(self._net_of, size, tokens))
        return drawn

    def _net_of(self, size: tuple[int, int], tokens: int, name: str, rows: int) -> BoundEngine:
        return self._net(name).step(size, rows, tokens=tokens)

    def _net(self, name: str) -> UNet:
        """An attached ControlNet."""
        if name not in self._nets:
            network = self.bundle.label(name)
            parts = store.in_parts(self.bundle, self.backend, network)
            self._nets[name] = UNet(self.bundle, self._engine, parts, network)
        return self._nets[name]

    def _after_step(self, drawn: list[list[Job]], bar: tqdm) -> Callable[[Job], None]:
        def after_step(job: Job) -> None:
            bar.update()
            callback = job.request.on_step
            if callback is not None:
                step = Step(job.image, job.row, job.table.rows, float(job.table.timesteps[job.row - 1]), job.latents,
                            lambda: self._picture(job.latents))
                if callback(step) is False:
                    for sibling in drawn[job.request_index]:
                        sibling.cancelled = True
        return after_step

    def _finish(self, requests: list[Request],
                drawn: list[list[Job]]) -> tuple[list[list[Image.Image]], list[list[int]]]:
        """The pictures of every request, and which of them were withheld."""
        images: list[list[Image.Image]] = [[] for _ in requests]
        withheld: list[list[int]] = [[] for _ in requests]
        wanted = [(r, j) for r, group in zip(requests, drawn, strict=True) if r.output == "image" for j in group
                  if not j.cancelled]
        with self._bar(total=len(wanted), desc="decode", unit="image") as bar:
            for request, job in wanted:
                image = self._picture(job.latents)
                if request.paste:
                    image = paste(request, image)
                if self._safety_checker is not None and (passed := self._safety_checker(image)) is not image:
                    if passed is None:
                        withheld[job.request_index].append(job.image)
                    image = passed or Image.new("RGB", image.size)
                images[job.request_index].append(image)
                bar.update()
        return images, withheld

    def _encode_picture(self, image: np.ndarray) -> Encoded:
        """float32 [3, height, width] in [-1, 1] to its latents."""
        size, factor = self._tile_of(*image.shape[1:]), self.bundle.manifest.latent.factor
        encoder = self._engine(self.bundle.network("first_stage_encoder"), 1, *size)

        def run(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            found = encoder(image=part[None])
            return found["mean"][0], found["std"][0]

        if size == image.shape[1:]:
            return Encoded(*run(image))
        return Encoded(*tiles.encode(image, run, (size[0] // factor, size[1] // factor), factor))

    def _decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents float32 [C, h, w] to float32 [3, height, width], nominally in [-1, 1]."""
        factor = self.bundle.manifest.latent.factor
        whole = latents.shape[1] * factor, latents.shape[2] * factor
        size = self._tile_of(*whole)
        decoder = self._engine(self.bundle.network("first_stage_decoder"), 1, *size)

        def run(part: np.ndarray) -> np.ndarray:
            return decoder(latents=part[None])["image"][0]

        return run(latents) if size == whole else tiles.decode(latents, run, (size[0] // factor, size[1] // factor),
                                                               factor)

    def _tile_of(self, height: int, width: int) -> tuple[int, int]:
        """What the VAE is given of a picture at once, in pixels."""
        return min(height, self._tile or height), min(width, self._tile or width)

    def _picture(self, latents: np.ndarray) -> Image.Image:
        """Latents float32 [C, h, w] decoded to a picture where the decoder runs."""
        factor = self.bundle.manifest.latent.factor
        size = (latents.shape[1] * factor, latents.shape[2] * factor)
        if self._tile_of(*size) != size:
            return Image.fromarray(to_uint8((self._decode(latents).transpose(1, 2, 0) * 0.5 + 0.5).clip(0.0, 1.0)))
        if size not in self._decoders:
            self._decoders[size] = Decoder(self._engine(self.bundle.network("first_stage_decoder"), 1, *size))
        return Image.fromarray(self._decoders[size](latents[None])[0])

    def _slots_for(self, size: tuple[int, int], tokens: int, jobs: list[Job]) -> Slots:
        """Slots of this size that hold the jobs; kept, so that their addresses, and graphs with them, stay."""
        needed = Capacity.of(jobs)
        key = (*size, needed.memory, needed.times, needed.nets)
        if key not in self._slots or self._slots[key].capacity.rows < needed.rows:
            rows = self.batch * (2 if any(job.request.guided for job in jobs) else 1)
            self._slots[key] = Slots(self._unet.step(size, rows, tokens=tokens).device, self.batch, needed)
        return self._slots[key]

    def _capture(self) -> None:
        """Draw two short pictures for nobody: libraries set themselves up, and what repeats becomes a graph.

        Guided first, so that the largest batch is captured first.
        """
        progress, self._progress = self._progress, False
        try:
            for _ in range(2):
                self(blank(self.bundle.manifest, self.size))
        finally:
            self._progress = progress

    def _engine(self, component: str, batch: int, height: int = 0, width: int = 0, *, tokens: int = 0) -> BoundEngine:
        """The engine of a static shape, loaded (and built, where need be) at its first use and kept.

        tokens: of the text, 0 for those of one prompt.
        """
        tokens = tokens or self.bundle.tokens
        key = (component, batch, height, width, tokens)
        if key not in self._engines:
            dtype = self.bundle.component(component).dtype if engines.backend(self.backend).on_gpu else self.dtype
            config = self.bundle.config(component, backend=self.backend, dtype=dtype, batch=batch,
                                        size=(height, width), tokens=tokens, threads=self._threads,
                                        device=self.device, options=self._options)
            start = time.perf_counter()
            engine = store.load(self.bundle, component, config)
            self._engines[key] = BoundEngine(engine, self._place(engine))
            logger.info("%s %s ready in %.2f s", component, config.dims, time.perf_counter() - start)
        return self._loras.fit(component, self._engines[key])

    def _place(self, engine: Engine) -> Device:
        """Where an engine runs: this host, or the GPU of the number that it says."""
        number = engine.gpu
        if number is None:
            return self._host
        if number not in self._gpus:
            try:
                self._gpus[number] = Cuda(number, runtime_kernels(self.bundle, gpus()[number].arch), self._eager)
            except KernelError as e:
                raise EngineError(str(e)) from e
        return self._gpus[number]

    def _resolve(self, request: Request) -> Request:
        """Fill in size and seed, and refuse what this model cannot do."""
        if not isinstance(request, Request):
            raise ValueError(f"request: got {type(request).__name__}, expected a Request or a list of them")
        manifest = self.bundle.manifest
        if self._depth_estimator and manifest.condition("depth") and request.depth is None:
            depth = self._depth_estimator(pictures.read(request.image, "image"))
            request = dataclasses.replace(request, depth=np.asarray(depth, np.float32))
        for control in request.control:
            if control.name not in (attached := self.bundle.labels):
                raise ValueError(f"control: got {control.name!r}, expected one that is attached "
                                 f"({', '.join(attached) or 'none is'}); attach it with: python -m export CONTROLNET "
                                 f"--into {self.bundle.path} --as {control.name}")
            if request.frames is None:
                pictures.read(control.image, "control")
            else:
                video.read(control.image, "control", limit=1)
        request = resolve(request, manifest, self.size)
        height, width = _size(request)
        self.bundle.check_size(height, width)
        table_of(request, manifest)
        self._loras.check(request.loras)
        latent = manifest.latent
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
