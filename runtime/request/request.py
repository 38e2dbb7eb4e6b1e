"""What a user asks for: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from runtime.lora.application import Lora, as_loras
from runtime.request import checks
from runtime.request.control import Control, read_controls
from runtime.text.prompt import parse

TASKS = ("text-to-image", "image-to-image", "inpaint", "depth-to-image", "upscale", "invert", "video")
OUTPUTS = ("image", "latent")
PROMPT_STYLES = ("plain", "weighted")
BLENDS = ("current", "next", "before")
ENCODINGS = ("sample", "mean")
MAX_SEED = 2**64 - 1
PICTURES = ("image", "mask", "depth", "frames")
"""Fields that hold pictures: the file they come from is stored with a request, what is given by hand is not."""
NOT_STORED = (*PICTURES, "latents")


@dataclass(frozen=True)
class Step:
    """What `Request.on_step` is called with after every UNet evaluation of one image.

    image: index within the request. step: evaluations done, of `steps`. latents: float32 [C, h, w], the sampler's
    state; a view, copy it to keep it. preview(): the latents decoded as they are, a PIL image (costs a VAE decode).
    """

    image: int
    step: int
    steps: int
    timestep: float
    latents: np.ndarray
    preview: Callable[[], Any]


@dataclass(frozen=True)
class Request:
    """One prompt and everything that shapes its pictures.

    prompt, negative_prompt: text. None is what the model takes for no negative prompt: the empty one, or zeros in
    Stable Diffusion XL.
    prompt_style: "plain", brackets are text and tokens past the encoder's length are dropped with a warning, as in
    diffusers; or "weighted", `(word:1.3)`, `[word]` and BREAK mean what they do in the Stable Diffusion web UI, and a
    prompt may be of any length (`runtime.text.prompt`). embeddings: textual inversions, "FILE" or "NAME=FILE"
    (`runtime.text.embeddings`), whose names stand for them in both prompts.
    height, width: pixels; None takes the size of `image`, rounded down to one that the model draws, or without one the
    size the pipeline was loaded with.
    steps: solver steps. guidance: classifier-free guidance scale (arXiv 2207.12598); at 1 or below the model runs
    without it, in half the rows. guidance_rescale: phi of arXiv 2305.08891 section 3.4, 0 to 1.
    scheduler: a short name or diffusers class name (`runtime.schedulers`), None for the checkpoint's own.
    eta: DDIM's noise share, 0 to 1. timesteps: the solver's timesteps instead of `steps` evenly chosen ones.
    seed: 0 … 2**64 - 1; image i of `count` uses seed + i, with the noise torch's CPU generator gives; None draws one.
    latents: float32 [C, h, w] or [count, C, h, w] of unit variance to start from, in place of noise.
    loras: LoRAs on the UNet and text encoders, of `runtime.lora.application.Lora` or paths; none by default.
    output: "image", or "latent" to stop before decoding.
    on_step: called with a `Step` after every evaluation; returning False cancels the request.

    task: one of TASKS, to be refused where the model does another; None for what the pictures say.
    Of tasks that begin with a picture (`docs/tasks.md`), None where there is none:

    image: a file, PIL image, uint8 or float [H, W, 3] array, or float32 latents [C, h, w] (one for each of `count`, if
    there are four dimensions). strength: 0 to 1, the share of the steps that are run on it; None is the task's own.
    mask: white is painted anew, black stays. depth: of every pixel, in any unit, as a picture or [H, W] array.
    encoding: latents of the picture as a "sample" of what the VAE gives, or its "mean"; None for the mean to invert,
    for a sample else.
    blend: how a model without a mask of its own keeps what is masked: with the picture at the noise level of the step
    just taken ("current"), of the step that follows ("next", as diffusers does today), or with new noise before every
    step ("before", as CompVis does). paste: put the picture's own pixels back where the mask is black.
    noise_level: of the low-resolution picture in the x4 upscaler; higher invents more.
    frames: a video, whose frames are drawn anew one after another, each image-to-image, attending to the first and to
    the one before it: what `runtime.pictures.video.read` takes. every, limit: take every so manieth frame, at most so many.
    Frame i uses seed + i. The hint of a ControlNet may be a video too, of which the same frames are taken.

    Of Stable Diffusion XL: original_size, crop, target_size: (height, width) or (top, left) in pixels that the UNet is
    told; by default the picture's size, (0, 0) and the picture's size. aesthetic_score, negative_aesthetic_score: of
    the refiner, 6 and 2.5 by default. denoising_start, denoising_end: run only that part of the schedule, as a share of
    it; the base model ends where the refiner starts, and hands it its latents.

    Raises ValueError for a value that cannot be.
    """

    prompt: str
    negative_prompt: str | None = None
    prompt_style: str = "plain"
    embeddings: tuple[str | Path, ...] = ()
    height: int | None = None
    width: int | None = None
    steps: int = 50
    guidance: float = 7.5
    guidance_rescale: float = 0.0
    scheduler: str | None = None
    eta: float = 0.0
    timesteps: tuple[int, ...] | None = None
    seed: int | None = None
    count: int = 1
    latents: np.ndarray | None = field(default=None, compare=False)
    loras: tuple[Lora, ...] = ()
    output: str = "image"
    on_step: Callable[[Step], bool | None] | None = field(default=None, compare=False, repr=False)
    task: str | None = None
    image: Any = field(default=None, compare=False)
    strength: float | None = None
    mask: Any = field(default=None, compare=False)
    depth: Any = field(default=None, compare=False)
    encoding: str | None = None
    blend: str = "current"
    paste: bool = False
    noise_level: int | None = None
    frames: Any = field(default=None, compare=False)
    every: int = 1
    limit: int | None = None
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    aesthetic_score: float | None = None
    negative_aesthetic_score: float | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    control: tuple[Control, ...] = ()

    def __post_init__(self) -> None:
        checks.text("prompt", self.prompt)
        if self.negative_prompt is not None:
            checks.text("negative_prompt", self.negative_prompt)
        checks.choice("prompt_style", self.prompt_style, PROMPT_STYLES)
        for prompt in (self.prompt, self.negative_prompt or "") if self.prompt_style == "weighted" else ():
            parse(prompt)
        object.__setattr__(self, "embeddings", checks.embeddings(self.embeddings))
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                checks.whole(name, getattr(self, name), 1, 2**16)
        checks.whole("steps", self.steps, 1, 10_000)
        checks.whole("count", self.count, 1, 10_000)
        checks.number("guidance", self.guidance, 0.0, math.inf)
        for name in ("guidance_rescale", "eta", "strength", "denoising_start", "denoising_end"):
            if getattr(self, name) is not None:
                checks.number(name, getattr(self, name), 0.0, 1.0)
        for name in ("aesthetic_score", "negative_aesthetic_score"):
            if getattr(self, name) is not None:
                checks.number(name, getattr(self, name), 0.0, 1000.0)
        if self.seed is not None:
            checks.whole("seed", self.seed, 0, MAX_SEED - self.count + 1)
        if self.noise_level is not None:
            checks.whole("noise_level", self.noise_level, 0, 1000)
        if self.scheduler is not None and not isinstance(self.scheduler, str):
            raise ValueError(f"scheduler: got {self.scheduler!r}, expected a name such as 'ddim', or None")
        if self.task is not None:
            checks.choice("task", self.task, TASKS)
        checks.choice("output", self.output, OUTPUTS)
        checks.choice("blend", self.blend, BLENDS)
        if self.encoding is not None:
            checks.choice("encoding", self.encoding, ENCODINGS)
        for name, low in (("original_size", 1), ("crop", 0), ("target_size", 1)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, checks.pair(name, getattr(self, name), low))
        for name in PICTURES:
            (checks.video if name == "frames" else checks.picture)(name, getattr(self, name))
        checks.whole("every", self.every, 1, 10_000)
        if self.limit is not None:
            checks.whole("limit", self.limit, 1, 10_000)
        object.__setattr__(self, "control", read_controls(self.control))
        if self.timesteps is not None:
            object.__setattr__(self, "timesteps", checks.timesteps(self.timesteps))
        if self.latents is not None:
            object.__setattr__(self, "latents", checks.latents("latents", self.latents, self.count))
        object.__setattr__(self, "loras", as_loras(self.loras))
        if self.on_step is not None and not callable(self.on_step):
            raise ValueError(f"on_step: got {self.on_step!r}, expected a function of one Step")

    @property
    def guided(self) -> bool:
        """Whether the model also runs on the negative prompt (diffusers' rule: guidance above 1)."""
        return self.guidance > 1.0

    def to_json(self) -> dict[str, Any]:
        """Every field that JSON can hold and is not the default; of pictures and latents given by hand, true."""
        out: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name in NOT_STORED:
                if value is not None:
                    out[f.name] = str(value) if isinstance(value, (str, Path)) else True
            elif f.name in ("control", "loras"):
                if value:
                    out[f.name] = [one.to_json() for one in value]
            elif f.name != "on_step" and (f.default is dataclasses.MISSING or value != f.default):
                out[f.name] = list(value) if isinstance(value, tuple) else value
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`. Raises ValueError for unknown keys, and for what was given by hand."""
        known = {f.name for f in dataclasses.fields(cls)} - {"on_step"}
        if unknown := set(data) - known:
            raise ValueError(f"request: got unknown options {sorted(unknown)}, expected some of {sorted(known)}")
        given = [name for name in NOT_STORED if data.get(name) is True]
        if given := given + [f"control {one['name']}" for one in data.get("control", ()) if one.get("image") is True]:
            raise ValueError(f"request: its {' and '.join(given)} were given by hand, which are not stored; "
                             "pass the same ones through the Python interface to repeat it")
        return cls(**data)
