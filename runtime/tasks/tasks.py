"""What a task decides: how the latents of an image start, what is blended in after a step, what else the UNet is given.

    text-to-image     from noise
    image-to-image    from a picture, its latents noised to the level where the run begins (SDEdit, arXiv 2108.01073)
    inpaint           the same, and after every step what is masked becomes the picture's again (Avrahami et al.,
                      Blended Latent Diffusion, 2022); or with mask and masked picture as channels of the UNet
    depth-to-image    image-to-image, with a depth map as a channel of the UNet
    upscale           from noise, with a noised low-resolution picture as channels of the UNet
    invert            from a picture to the noise that DDIM draws it from, which is what `Result.latents` then are; no
                      other solver and, best, guidance 1
    video             every frame image-to-image, by a UNet that attends to the first frame and to the one before

A manifest says which of them its model does. Noise is drawn in the order in which diffusers draws it: that of a
low-resolution picture, of the picture's latents, of the start, of the masked picture's latents.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from engines.bundle import Manifest
from kernels.host.step import initial_state
from runtime.loop.denoise import Job
from runtime.loop.frames import Memory
from runtime.loop.noise import Generator
from runtime.networks.denoiser import Inputs, UNet
from runtime.pictures import read as pictures
from runtime.pictures import video
from runtime.pictures.hints import PREPROCESSORS
from runtime.request import checks
from runtime.request.control import Conditions, Control
from runtime.request.request import PICTURES, Request
from runtime.schedulers import Table, inversion_table, make_table, signal_and_sigma

NEEDS: dict[str, tuple[str, ...]] = {
    "text-to-image": (), "image-to-image": ("image",), "inpaint": ("image", "mask"),
    "depth-to-image": ("image", "depth"), "upscale": ("image",), "invert": ("image",), "video": ("frames",)}
"""Task → the pictures that a request brings."""

WHOLE = ("text-to-image", "upscale", "invert")
"""Tasks that run the whole schedule."""

DDIM = ("ddim", "DDIMScheduler")
"""The solver that inversion runs backwards."""

AESTHETIC = 6.0, 2.5
"""Scores that the refiner is told of the picture wanted and of the negative one (diffusers' defaults)."""

NOISE_LEVEL = 20
"""Of an upscaler's low-resolution picture, unless the request says another (diffusers' default)."""


class Encoded(NamedTuple):
    """Latents of a picture as the VAE gives them: mean and standard deviation, float32 [C, h, w]."""

    mean: np.ndarray
    std: np.ndarray


@dataclass(frozen=True)
class Model:
    """What tasks ask of a model. encode: a picture, float32 [3, height, width] in [-1, 1], to its latents. net: an
    attached ControlNet by its name.
    """

    manifest: Manifest
    unet: UNet
    encode: Callable[[np.ndarray], Encoded]
    net: Callable[[str], UNet]


def task_of(request: Request, manifest: Manifest) -> str:
    """The task of a request: the model's only one, or the one whose pictures it brings.

    Raises ValueError where one is missing, or an option is given that this task does not have.
    """
    tasks = manifest.tasks
    brought = {name for name in PICTURES if getattr(request, name) is not None}
    wanted = next((task for name, task in (("frames", "video"), ("mask", "inpaint"), ("image", "image-to-image"))
                   if name in brought), "text-to-image")
    task = wanted if wanted in tasks else tasks[0]
    if wanted == "video" != task:
        raise ValueError(f"frames: got a video, expected none: this {manifest.family} model does {', '.join(tasks)}; "
                         "use one that starts from latents alone, exported by this version")
    if request.task == "invert" and request.output != "latent":
        raise ValueError(f"output: got {request.output!r} for a picture to invert, expected 'latent': what comes "
                         "of it is noise, to be passed on as latents=…")
    if request.task is not None and request.task not in tasks:
        raise ValueError(f"task: got {request.task!r}, expected one of {', '.join(tasks)}, which is what this "
                         f"{manifest.family} model does; use a model that does {request.task}")
    task = request.task or task
    for name in NEEDS[task]:
        if name not in brought:
            raise ValueError(f"{name}: got none, expected one, for this model does {task}; pass {name}=…")
    for name in sorted(brought - set(NEEDS[task])):
        able = " or ".join(t for t, names in NEEDS.items() if name in names)
        raise ValueError(f"{name}: got one, but {task} takes none; leave it out, or use a model that does {able}")
    encodes, sizes = task not in ("text-to-image", "upscale"), _fields(manifest, "sizes")
    for name, where in (
            ("strength", task not in WHOLE), ("noise_level", task == "upscale"), ("encoding", encodes),
            ("denoising_start", task not in WHOLE), ("denoising_end", task != "invert"),
            ("timesteps", task != "invert"), ("scheduler", task != "invert" or request.scheduler in DDIM),
            ("limit", task == "video"), ("latents", task != "video"),
            *((name, name in sizes) for name in ("original_size", "crop", "target_size", "aesthetic_score")),
            ("negative_aesthetic_score", "aesthetic_score" in sizes)):
        if (value := getattr(request, name)) is not None and not where:
            got = f"an array {value.shape}" if isinstance(value, np.ndarray) else repr(value)
            raise ValueError(f"{name}: got {got}, which {task} with this {manifest.family} model does not have; "
                             "leave it out")
    if (request.blend != "current" or request.paste) and task != "inpaint":
        raise ValueError(f"blend, paste: got them for {task}, expected them with a picture and a mask; leave them out")
    if task == "video" and request.count != 1:
        raise ValueError(f"count: got {request.count} for a video, expected 1; draw another one with another seed")
    if task != "video" and request.every != 1:
        raise ValueError(f"every: got {request.every}, which {task} does not have; leave it out")
    if request.paste and _latents(request, manifest) is not None:
        raise ValueError("paste: got latents to begin with, expected a picture, whose pixels stay; leave it out")
    if request.blend != "current" and manifest.joined:
        raise ValueError(f"blend: got {request.blend!r} for a model that takes the mask itself, expected none; "
                         "leave it out")
    return task


def resolve(request: Request, manifest: Manifest, size: tuple[int, int]) -> Request:
    """The request with size, seed and the task's defaults filled in; `size` is taken where no picture says one.

    Raises ValueError for what this model cannot do.
    """
    task, channels = task_of(request, manifest), bool(manifest.joined)
    default = size if task == "text-to-image" else picture_size(request, manifest)
    seed = secrets.randbelow(2**32) if request.seed is None else request.seed
    height, width = request.height or default[0], request.width or default[1]
    filled: dict[str, Any] = {"height": height, "width": width, "seed": seed}
    if task == "upscale":
        filled["noise_level"] = level = NOISE_LEVEL if request.noise_level is None else request.noise_level
        if level > manifest.max_noise_level:
            raise ValueError(f"noise_level: got {level}, expected at most {manifest.max_noise_level}")
    elif task not in WHOLE and request.strength is None:  # the defaults of diffusers' pipelines
        whole = task == "inpaint" and (channels or request.blend == "next")
        filled["strength"] = 1.0 if whole else manifest.defaults.get("strength", 0.8)
    return dataclasses.replace(request, **filled)


def picture_size(request: Request, manifest: Manifest) -> tuple[int, int]:
    """(height, width) in pixels of what is drawn of a request's picture: its own, rounded down to what fits."""
    latent = manifest.latent
    given = _latents(request, manifest)
    if given is not None:
        return given.shape[-2] * latent.factor, given.shape[-1] * latent.factor
    width, height = first_picture(request).size
    step = latent.multiple * (1 if task_of(request, manifest) == "upscale" else latent.factor)
    scale = latent.factor if step == latent.multiple else 1
    return max(height // step, 1) * step * scale, max(width // step, 1) * step * scale


def first_picture(request: Request) -> Image.Image:
    """What a request begins with."""
    if request.frames is not None:
        return video.read(request.frames, "frames", limit=1).frames[0]
    return pictures.read(request.image, "image")


def table_of(request: Request, manifest: Manifest) -> Table:
    """The rows of the solver that a resolved request runs: the checkpoint's own scheduler unless it names another."""
    if request.task == "invert":
        return inversion_table(manifest.scheduler, request.steps)
    steps = None if request.timesteps is not None else request.steps

    def table(start: int = 0) -> Table:
        return make_table(manifest.scheduler, steps, scheduler=request.scheduler, eta=request.eta,
                          timesteps=request.timesteps, start=start)

    whole, first = table(), 0
    trained = int(manifest.scheduler.get("num_train_timesteps", 1000))
    if request.denoising_start is not None:
        rows = int((whole.timesteps < round(trained * (1 - request.denoising_start))).sum())
        first = whole.rows - rows - (whole.order == 2 and rows % 2 == 0)
    elif request.strength is not None:
        asked = len(request.timesteps or ()) or request.steps
        first = max(asked - min(int(asked * request.strength), asked), 0) * whole.order
    if first >= whole.rows:
        raise ValueError(f"strength, denoising_start: got {request.strength} and {request.denoising_start} of "
                         f"{request.steps} steps, of which none is left; take more")
    run = table(first) if first else whole
    if request.denoising_end is not None:
        run = run.first(int((run.timesteps >= round(trained * (1 - request.denoising_end))).sum()))
    return run


def jobs(requests: Sequence[Request], texts: Sequence[Inputs], model: Model) -> Iterator[Job]:
    """The jobs of resolved requests; texts[i]: what the UNet takes of the text, by input name, [2, …] each."""
    for index, (request, text) in enumerate(zip(requests, texts, strict=True)):
        told, table = {**text, **_numbers(request, model)}, table_of(request, model.manifest)
        given = model.unet.fixed(told), model.unet.time(table.timesteps)
        nets = {one.name: _conditions(one, model.net(one.name), told, table) for one in request.control}
        memory, before = Memory(table.rows), None
        for n, still in enumerate(_stills(request)):
            begin = _Begin(still, model, table)
            control = {one.name: begin.hinted(one, model.net(one.name), nets[one.name]) for one in still.control}
            if request.frames is None:
                for image in range(request.count):
                    yield begin.job(index, image, *given, control)
            else:
                job = begin.job(index, n, *given, control)
                job.memory, job.after = memory, before
                yield job
                before = job


def _stills(request: Request) -> Iterator[Request]:
    """The request itself, or that of every frame of its video, with its own hints."""
    if request.frames is None:
        yield request
        return
    frames = video.read(request.frames, "frames", request.every, request.limit).frames
    hints = [video.read(one.image, "control", request.every, request.limit).frames for one in request.control]
    for one, found in zip(request.control, hints, strict=True):
        if len(found) not in (1, len(frames)):
            raise ValueError(f"control {one.name}: got {len(found)} hints for {len(frames)} frames, expected as "
                             "many, or one for all of them")
    for n, frame in enumerate(frames):
        control = tuple(dataclasses.replace(one, image=found[n % len(found)])
                        for one, found in zip(request.control, hints, strict=True))
        yield dataclasses.replace(request, task="image-to-image", image=frame, frames=None, every=1, limit=None,
                                  control=control)


def blank(manifest: Manifest, size: tuple[int, int]) -> Request:
    """A short request that the model can honour, of pictures of nothing."""
    grey = np.linspace(0, 1, size[0] * size[1], dtype=np.float32).reshape(size)
    task = manifest.tasks[0]
    given: dict[str, Any] = {name: grey if name == "depth" else np.stack([grey] * 3, axis=2) for name in NEEDS[task]}
    strength = None if task in ("text-to-image", "upscale") else 1.0
    return Request("", height=size[0], width=size[1], steps=4, seed=0, strength=strength, **given)


def paste(request: Request, image: Image.Image) -> Image.Image:
    """The picture drawn, with the pixels of the one given where its mask is black."""
    old, mask = pictures.read(request.image, "image"), pictures.read(request.mask, "mask")
    return Image.composite(image, old.convert("RGB").resize(image.size, Image.Resampling.LANCZOS),
                           mask.convert("L").resize(image.size, Image.Resampling.LANCZOS))


class _Begin:
    """How the images of one request begin; what they share is computed once."""

    def __init__(self, request: Request, model: Model, table: Table) -> None:
        assert request.height and request.width
        self.request, self.manifest, latent = request, model.manifest, model.manifest.latent
        self.task = task_of(request, self.manifest)
        self.table = table
        self.level = np.float32(self.table.signal[0]), np.float32(self.table.sigma[0])
        self.pixels = request.height, request.width
        self.factor = latent.factor
        self.size = request.height // latent.factor, request.width // latent.factor
        self.shape = latent.channels, *self.size
        takes_mask = self.manifest.condition("masked_image") is not None
        self.blends = self.task == "inpaint" and not self.manifest.joined
        if self.blends and request.blend != "current":
            self.table = self.table.following()
        self.start: Encoded | np.ndarray | None = None
        if self.task != "upscale" and request.image is not None and (not takes_mask or request.strength != 1):
            self.start = _latents(request, self.manifest)
            if self.start is None:
                self.start = model.encode(self._picture())
            elif self.start.shape[-3:] != self.shape:
                raise ValueError(f"image: got latents of shape {self.start.shape[-3:]}, expected {self.shape}")
        if self.task == "depth-to-image":
            self.depth = pictures.depth_map(request.depth, self.size)
        self.masked: Encoded | None = None
        if takes_mask:
            self.mask = pictures.hard_mask(pictures.read(request.mask, "mask"), self.pixels)
            self.masked = model.encode(self._picture() * (1 - self.mask))

    def job(self, index: int, image: int, fixed: Inputs, time: Inputs, control: Mapping[str, Conditions]) -> Job:
        """Image number `image` of the request."""
        request, table = self.request, self.table
        assert request.seed is not None
        noise = Generator(request.seed + image)
        channels = self._low_resolution(noise) if self.task == "upscale" else {}
        x0 = None if self.start is None else self._sample(self.start, noise, image)
        first = noise.randn(self.shape) if request.latents is None else request.latents[image]
        state = initial_state(table, first)
        if x0 is not None and (request.denoising_start is not None or self.task == "invert"):
            state[0] = x0
        elif x0 is not None and not (self.blends and request.blend == "next" and request.strength == 1):
            signal, sigma = self.level
            state[0] = signal * x0 + sigma * first
        if self.masked is not None:
            channels["mask"] = self.mask[None, ::self.factor, ::self.factor]
            channels["masked_image"] = self._sample(self.masked, noise, image)
        elif self.blends and request.blend == "next":
            noise.randn(self.shape)  # diffusers encodes the masked picture for these too, and does not use it
        if self.task == "depth-to-image":
            channels["depth"] = self.depth
        known = np.stack([x0, first, self._keep()]) if x0 is not None and self.blends else None
        if known is not None and request.blend == "before":
            known[1] = noise.randn(self.shape)
            signal, sigma = self.level
            state[0] = known[2] * (signal * known[0] + sigma * known[1]) + (1 - known[2]) * state[0]
        rows = {name: np.broadcast_to(value, (2, *value.shape)) for name, value in channels.items()}
        return Job(request, index, image, {**fixed, **rows}, time, table, noise, state, known,
                   renewed=request.blend == "before", control=control)

    def hinted(self, control: Control, net: UNet, conditions: Conditions) -> Conditions:
        """`conditions` of a ControlNet, and what it makes of its hint."""
        preprocess = PREPROCESSORS[control.preprocessor] if control.preprocessor else None
        hint = net.hint(pictures.hint(pictures.read(control.image, "control"), self.pixels, preprocess))
        rows = {name: np.broadcast_to(value, (2, *value.shape[1:])) for name, value in hint.items()}
        return Conditions({**conditions.fixed, **rows}, conditions.time)

    def _picture(self) -> np.ndarray:
        return pictures.pixels(pictures.read(self.request.image, "image"), self.pixels)

    def _low_resolution(self, noise: Generator) -> Inputs:
        """The picture at the size of the latents, noised to the level that the UNet is told."""
        assert self.manifest.low_res_scheduler and self.request.noise_level is not None
        signal, sigma = signal_and_sigma(self.manifest.low_res_scheduler, self.request.noise_level)
        low = pictures.pixels(pictures.read(self.request.image, "image"), self.size)
        return {"low_resolution": np.float32(signal) * low + np.float32(sigma) * noise.randn(low.shape)}

    def _sample(self, encoded: Encoded | np.ndarray, noise: Generator, image: int) -> np.ndarray:
        """Latents of image number `image` of the request, drawn if it wants a sample of what the VAE gives."""
        if isinstance(encoded, np.ndarray):
            return encoded[image]
        if self.request.encoding == "mean" or (self.request.encoding is None and self.task == "invert"):
            return encoded.mean
        return encoded.mean + encoded.std * noise.randn(self.shape)

    def _keep(self) -> np.ndarray:
        """What stays of the picture, float32 [C, h, w]: 1 where its mask is black."""
        image = pictures.read(self.request.mask, "mask")
        if self.request.blend == "next":
            mask = pictures.hard_mask(image, self.pixels)[::self.factor, ::self.factor]
        else:
            mask = pictures.soft_mask(image, self.size)
        return np.broadcast_to(1 - mask, self.shape)


def _conditions(control: Control, net: UNet, told: Inputs, table: Table) -> Conditions:
    """What a ControlNet is given beside its hint; told: what the UNet is, of the text and of numbers."""
    return Conditions(net.fixed(told), {**net.time(table.timesteps), "scale": control.scales(table.rows)})


def _latents(request: Request, manifest: Manifest) -> np.ndarray | None:
    """`request.image` as latents, one for each image, or None where it is a picture."""
    value, channels = request.image, manifest.latent.channels
    if not isinstance(value, np.ndarray) or value.ndim not in (3, 4) or value.shape[-3] != channels \
            or value.shape[-1] in (1, 3, 4):
        return None
    return checks.latents("image", value, request.count)


def _numbers(request: Request, model: Model) -> Inputs:
    """What else the UNet takes that is the same all through a request: labels and sizes, [2, …] each."""
    found: Inputs = {}
    level, sizes = model.manifest.condition("noise_level"), model.manifest.condition("sizes")
    if level and request.noise_level is not None:
        found[level.input] = np.full(2, request.noise_level, np.int64)
    if sizes:
        size = request.height, request.width
        scores = [own if given is None else given for own, given in
                  zip(AESTHETIC, (request.aesthetic_score, request.negative_aesthetic_score), strict=True)]
        rows = []
        for score in reversed(scores):  # the negative prompt first
            numbers = {"original_size": request.original_size or size, "crop": request.crop or (0, 0),
                       "target_size": request.target_size or size, "aesthetic_score": (score,)}
            rows.append([number for field in sizes.fields for number in numbers[field]])
        found[sizes.input] = np.array(rows, np.float32)
    return found


def _fields(manifest: Manifest, meaning: str) -> tuple[str, ...]:
    """Return the options that a condition is made of; empty where the model is not told such."""
    condition = manifest.condition(meaning)
    return condition.fields if condition else ()
