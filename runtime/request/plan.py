"""A plan holds all of a request that can be known before anything is computed; each of its pictures is read once."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from engines.bundle import Bundle, Manifest
from runtime.config import DepthEstimator
from runtime.pictures import read as pictures
from runtime.pictures import video
from runtime.pictures.video import Clip
from runtime.request import checks
from runtime.request.control import Control
from runtime.request.request import PARTLY, Request
from runtime.request.sampler import table_of
from runtime.request.task import takes_mask, task_of, value_without
from runtime.schedulers import Table

STRENGTH = 0.8
"""Share of the steps that is run on a picture, unless request or model say another."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Plan:
    """The work that a request is for one model.

    request: with size, seed and the task's defaults filled in. task: of `runtime.request.request.TASKS`. table: the
    rows of the sampler that every image of it runs. size: (height, width) in pixels. shape: [C, h, w] of the latents.
    image: the picture to begin with, or latents in its place, float32 [count, C, h, w]. depth: float32 [1, h, w] from
    -1 to 1. clip: the frames of a video. image, mask, depth and clip are None where the task has none. hints: for each
    of the request's ControlNets its pictures, one for all images, or one a frame.
    """

    request: Request
    task: str
    table: Table
    size: tuple[int, int]
    shape: tuple[int, int, int]
    image: Image.Image | np.ndarray | None = None
    mask: Image.Image | None = None
    depth: np.ndarray | None = None
    clip: Clip | None = None
    hints: tuple[tuple[Image.Image, ...], ...] = ()

    @property
    def factor(self) -> int:
        """Return the pixels a latent, along each side."""
        return self.size[0] // self.shape[1]

    @property
    def count(self) -> int:
        """Return how many images are drawn, or frames of a video."""
        return len(self.clip.frames) if self.clip else self.request.count

    @property
    def rate(self) -> float | None:
        """Return the frames a second of a video."""
        return self.clip.rate if self.clip else None

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the pictures in the folder that a video came from."""
        return self.clip.names if self.clip else ()

    @property
    def seed(self) -> int:
        """Return the seed; image i is drawn with the noise of seed + i."""
        assert self.request.seed is not None  # `plan` filled it in
        return self.request.seed


def plan(request: Request, bundle: Bundle, size: tuple[int, int],
         depth_estimator: DepthEstimator | None = None) -> Plan:
    """Read the pictures of a request and work out what it does with the model of `bundle`.

    size: (height, width) in pixels of what is drawn where neither the request nor a picture says it. depth_estimator:
    asked where the model needs a depth map and the request has none.

    Raises ValueError for everything that this model cannot do.
    """
    if not isinstance(request, Request):
        raise ValueError(f"request: got {type(request).__name__}, expected a Request or a list of them")
    manifest, read = bundle.manifest, _Pictures()
    if depth_estimator and request.depth is None and request.image is not None and manifest.condition("depth"):
        estimated = depth_estimator(read.picture(request.image, "image"))
        request = dataclasses.replace(request, depth=np.asarray(estimated, np.float32))
    task = task_of(request, manifest)
    for control in request.control:
        _check_attached(control, bundle)
    clip = None if request.frames is None else read.clip(request.frames, "frames", request.every, request.limit)
    hints = tuple(_hints(control, request, clip, read) for control in request.control)
    image = None if request.image is None else _image(request, task, manifest, read)
    mask = None if request.mask is None else read.picture(request.mask, "mask")
    first = clip.frames[0] if clip else image
    request = _filled(request, task, manifest, size if first is None else _size(first, task, manifest))
    assert request.height and request.width
    size, factor = (request.height, request.width), manifest.latent.factor
    bundle.check_size(*size)
    shape = manifest.latent.channels, size[0] // factor, size[1] // factor
    if isinstance(image, np.ndarray) and image.shape[1:] != shape:
        raise ValueError(f"image: got latents of shape {image.shape[1:]}, expected {shape}")
    if request.latents is not None and request.latents.shape[1:] != shape:
        raise ValueError(f"latents: got {request.latents.shape[1:]} an image, expected {shape} for {size[0]}x{size[1]}")
    depth = None if request.depth is None else pictures.depth_map(request.depth, shape[1:])
    table = table_of(request, task, manifest.scheduler)
    return Plan(request, task, table, size, shape, image, mask, depth, clip, hints)


def _filled(request: Request, task: str, manifest: Manifest, size: tuple[int, int]) -> Request:
    """Return the request with size, seed and the defaults of its task."""
    options: dict[str, Any] = {
        "height": request.height or size[0], "width": request.width or size[1],
        "seed": secrets.randbelow(2**32) if request.seed is None else request.seed}
    if task == "upscale":
        level = value_without("noise_level") if request.noise_level is None else request.noise_level
        if level > manifest.max_noise_level:
            raise ValueError(f"noise_level: got {level}, expected at most {manifest.max_noise_level}")
        options["noise_level"] = level
    elif task in PARTLY and request.strength is None:  # the defaults of diffusers' pipelines
        anew = task == "inpaint" and (takes_mask(manifest) or request.blend == "next")
        options["strength"] = 1.0 if anew else manifest.defaults.get("strength", STRENGTH)
    return dataclasses.replace(request, **options)


def _size(first: Image.Image | np.ndarray, task: str, manifest: Manifest) -> tuple[int, int]:
    """Return (height, width) in pixels of what is drawn of a picture: its own size, rounded down to what fits."""
    latent = manifest.latent
    if isinstance(first, np.ndarray):
        return first.shape[-2] * latent.factor, first.shape[-1] * latent.factor
    step = latent.multiple * (1 if task == "upscale" else latent.factor)
    scale = latent.factor if task == "upscale" else 1
    return max(first.height // step, 1) * step * scale, max(first.width // step, 1) * step * scale


def _image(request: Request, task: str, manifest: Manifest, read: _Pictures) -> Image.Image | np.ndarray:
    """Return the picture that a request begins with, or latents, float32 [count, C, h, w].

    A picture it must be where pixels are needed: to be enlarged, to be masked for the denoiser, or to be pasted.
    """
    value = request.image
    if task == "upscale" or takes_mask(manifest) or not isinstance(value, np.ndarray) or value.ndim not in (3, 4) \
            or value.shape[-3] != manifest.latent.channels or value.shape[-1] in (1, 3, 4):
        return read.picture(value, "image")
    if request.paste:
        raise ValueError("paste: got latents to begin with, expected a picture, whose pixels stay; leave it out")
    return checks.latents("image", value, request.count)


def _check_attached(control: Control, bundle: Bundle) -> None:
    if control.name not in (attached := bundle.labels):
        raise ValueError(f"control: got {control.name!r}, expected one that is attached "
                         f"({', '.join(attached) or 'none is'}); attach it with: python -m export CONTROLNET "
                         f"--into {bundle.path} --as {control.name}")


def _hints(control: Control, request: Request, clip: Clip | None, read: _Pictures) -> tuple[Image.Image, ...]:
    if clip is None:
        return (read.picture(control.image, "control"),)
    hints = read.clip(control.image, "control", request.every, request.limit).frames
    if len(hints) not in (1, len(clip.frames)):
        raise ValueError(f"control {control.name}: got {len(hints)} hints for {len(clip.frames)} frames, expected as "
                         "many, or one for all of them")
    return hints


@dataclass
class _Pictures:
    """The pictures and videos of one request: each is read once, whatever it is for."""

    read: dict[tuple[object, ...], Any] = field(default_factory=dict)

    def picture(self, value: Any, name: str) -> Image.Image:
        return self._once(value, (), lambda: pictures.read(value, name))

    def clip(self, value: Any, name: str, every: int, limit: int | None) -> Clip:
        return self._once(value, (every, limit), lambda: video.read(value, name, every, limit))

    def _once(self, value: Any, how: tuple[object, ...], make: Callable[[], T]) -> T:
        key = (str(value) if isinstance(value, (str, Path)) else id(value), *how)
        if key not in self.read:
            self.read[key] = make()
        return self.read[key]
