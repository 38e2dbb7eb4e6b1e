"""A request: one frozen dataclass, each of whose options is declared once and checked when it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from runtime.request import checks
from runtime.request.checks import boolean, choice, number, pair, picture, short_name, text, whole
from runtime.request.control import CONTROLS, Control
from runtime.request.lora import LORAS, Lora
from runtime.request.option import check_options, members, option, options_of, origin, stored
from runtime.schedulers import names
from runtime.text.prompt import parse

TASKS = ("text-to-image", "image-to-image", "inpaint", "depth-to-image", "upscale", "invert", "video")
PARTLY = ("image-to-image", "inpaint", "depth-to-image", "video")
"""Tasks that may run a part of the schedule only: they begin with a picture and noise."""
NOT_INVERT = tuple(task for task in TASKS if task != "invert")
NOT_VIDEO = tuple(task for task in TASKS if task != "video")
FROM_NOISE = tuple(task for task in TASKS if task not in ("invert", "video"))
"""Tasks that take other noise than that of the seed."""
DDIM = ("ddim", "DDIMScheduler")
"""The solver that inversion runs backwards."""

PICTURE, XL = "pictures to begin with", "Stable Diffusion XL"
"""Headings of options on the command line."""
MAX_SEED = 2**64 - 1
MASKED = "blend, paste: got them for {task}, expected them with a picture and a mask; leave them out"


@dataclass(frozen=True)
class Step:
    """The state of one image, which `Request.on_step` is called with after every evaluation of the denoiser.

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
    """A request is one prompt and everything that shapes its pictures.

    An option that is None is what the task or the model has for it. Pictures are files, PIL images, or uint8 or float
    arrays [H, W, 3]. docs/tasks.md says which task has which option. Raises ValueError for a value that cannot be.
    """

    prompt: str = option(MISSING, text(), "what to draw; several prompts are drawn as one batch")
    negative_prompt: str | None = option(None, text(), "what to keep away from", flag="--negative", unset="nothing")
    """None is what the model takes for no negative prompt: the empty one, or zeros in Stable Diffusion XL."""
    prompt_style: str = option(
        "plain", choice("plain", "weighted"), "weighted: (word:1.3), [word] and BREAK as in the Stable Diffusion web "
        "UI, and prompts of any length; plain: brackets are text, as in diffusers", flag="--prompt-style")
    """Tokens of a plain prompt past the encoder's length are dropped with a warning (`runtime.text.prompt`)."""
    embeddings: tuple[str | Path, ...] = option(
        (), checks.embeddings(), "textual inversion to use, a .safetensors file, whose name stands for it in the "
        "prompts", flag="--embedding", repeats=True)
    height: int | None = option(None, whole(1, 2**16), "pixels", unset="that of the picture, or of the pipeline")
    width: int | None = option(None, whole(1, 2**16), "pixels", unset="that of the picture, or of the pipeline")
    """A picture's own size is rounded down to one that the model draws."""
    steps: int = option(50, whole(1, 10_000), "solver steps", flag="--steps")
    guidance: float = option(7.5, number(0.0), "classifier-free guidance scale; 1 or below: off", flag="--guidance",
                             metavar="G")
    """arXiv 2207.12598. At 1 or below the model runs without it, in half the rows."""
    guidance_rescale: float = option(0.0, number(0.0, 1.0), "0 to 1, against over-exposure", flag="--guidance-rescale",
                                     metavar="PHI")
    """phi of arXiv 2305.08891 section 3.4."""
    scheduler: str | None = option(
        None, short_name("ddim"), f"diffusers class name or one of: {', '.join(names())}", flag="--scheduler",
        unset="the checkpoint's own", only={"invert": DDIM})
    eta: float = option(0.0, number(0.0, 1.0), "noise share of DDIM, 0 to 1", flag="--eta", metavar="ETA",
                        tasks=NOT_INVERT)
    timesteps: tuple[int, ...] | None = option(
        None, checks.timesteps(), "the solver's timesteps, highest first, instead of --steps", flag="--timesteps",
        tasks=NOT_INVERT)
    seed: int | None = option(None, whole(0, MAX_SEED), "0 to 2**64-1; image i uses seed + i", flag="--seed",
                              unset="drawn and printed")
    """The noise is what torch's CPU generator gives."""
    count: int = option(1, whole(1, 10_000), "images per prompt", flag="--count", tasks=NOT_VIDEO, refusal="{name}: "
                        "got {value} for a video, expected 1; draw another one with another seed")
    latents: np.ndarray | None = option(None, checks.array(), "start from these latents in place of noise",
                                        flag="--latents", compare=False, tasks=FROM_NOISE, store=origin)
    """Of unit variance, float32 [C, h, w], or [count, C, h, w] for each of `count` images."""
    loras: tuple[Lora, ...] = option((), LORAS, "a LoRA in .safetensors, as style.safetensors:0.7", flag="--lora",
                                     repeats=True, store=members)
    output: str = option("image", choice("image", "latent"), "latent: stop before decoding")
    on_step: Callable[[Step], bool | None] | None = option(
        None, checks.function("one Step"), "called after every evaluation; returning False cancels the request",
        compare=False, repr=False, store=None)

    task: str | None = option(None, choice(*TASKS), "refuse to do another", flag="--task", group=PICTURE,
                              unset="what the pictures given say")
    image: Any = option(
        None, picture(), "begin with this picture, of its own size unless --size says another; FILE.npy are latents",
        flag="--image", group=PICTURE, compare=False, tasks=("image-to-image", "inpaint", "depth-to-image", "upscale",
                                                             "invert"), needed=True, store=origin)
    """Or float32 latents [C, h, w], one for each of `count` if there are four dimensions."""
    strength: float | None = option(
        None, number(0.0, 1.0), "0 to 1: how much of the picture is drawn anew, the share of the steps that are run",
        flag="--strength", metavar="S", group=PICTURE, unset="0.8; 1 for models made for inpainting; 0.3 for Stable "
        "Diffusion XL", tasks=PARTLY)
    mask: Any = option(None, picture(), "paint only where this picture is white", flag="--mask", group=PICTURE,
                       compare=False, tasks=("inpaint",), needed=True, store=origin)
    blend: str = option(
        "current", choice("current", "next", "before"), "how models without a mask of their own keep the rest of the "
        "picture: noised as after the last step, as before the next, or anew before every step", flag="--blend",
        group=PICTURE, tasks=("inpaint",), refusal=MASKED)
    """"next" is what diffusers does today, "before" what CompVis did."""
    paste: bool = option(False, boolean(), "put the picture's own pixels back where the mask is black", flag="--paste",
                         group=PICTURE, tasks=("inpaint",), refusal=MASKED)
    encoding: str | None = option(
        None, choice("sample", "mean"), "begin with a sample of the picture's latents, or their mean",
        flag="--encoding", group=PICTURE, unset="sample; mean to invert", tasks=(*PARTLY, "invert"))
    depth: Any = option(None, picture(), "depth map, for models that take one", flag="--depth", group=PICTURE,
                        compare=False, tasks=("depth-to-image",), needed=True, store=origin)
    """Of every pixel, in any unit, as a picture or [H, W] array; larger is nearer."""
    noise_level: int | None = option(
        None, whole(0, 1000), "noise in the picture that is enlarged; higher invents more", flag="--noise-level",
        group=PICTURE, fallback=20, tasks=("upscale",), condition="noise_level")
    frames: Any = option(
        None, checks.video(), "draw every frame of this video anew: a folder of pictures, a GIF, an MP4; hints of "
        "ControlNets may be videos too. -o says what is written: FILE.mp4, FILE.gif, or a folder", flag="--frames",
        group=PICTURE, compare=False, tasks=("video",), needed=True, store=origin)
    """What `runtime.pictures.video.read` takes. Each frame attends to the first and to the one before; frame i uses
    seed + i."""
    every: int = option(1, whole(1, 10_000), "take every N-th frame only", flag="--every", group=PICTURE,
                        tasks=("video",))
    limit: int | None = option(None, whole(1, 10_000), "take N frames at most", flag="--limit", group=PICTURE,
                               tasks=("video",))
    control: tuple[Control, ...] = option(
        (), CONTROLS, "a ControlNet that is attached to the bundle, and its hint, as canny=edges.png:0.8; keys: start "
        "and end, the share of the steps that it is used in; preprocessor=canny for the edges of FILE",
        flag="--control", group=PICTURE, repeats=True, store=members)

    original_size: tuple[int, int] | None = option(
        None, pair(1), "of the picture that this is like", flag="--original-size", group=XL, unset="its own",
        condition="original_size")
    crop: tuple[int, int] | None = option(
        None, pair(0, checks.corner, "TOP,LEFT"), "where this was cut out of it", flag="--crop", group=XL,
        fallback=(0, 0), condition="crop")
    target_size: tuple[int, int] | None = option(
        None, pair(1), "size that is aimed at", flag="--target-size", group=XL, unset="its own",
        condition="target_size")
    aesthetic_score: float | None = option(
        None, number(0.0, 1000.0), "of the refiner: how good the picture is to be", flag="--aesthetic-score",
        metavar="A", group=XL, fallback=6.0, condition="aesthetic_score")
    negative_aesthetic_score: float | None = option(
        None, number(0.0, 1000.0), "of the refiner: how good what it keeps away from is",
        flag="--negative-aesthetic-score", metavar="A", group=XL, fallback=2.5, condition="aesthetic_score")
    denoising_start: float | None = option(
        None, number(0.0, 1.0), "0 to 1: leave out the schedule until here; of the refiner", flag="--denoising-start",
        metavar="F", group=XL, tasks=PARTLY)
    denoising_end: float | None = option(
        None, number(0.0, 1.0), "0 to 1: leave out the schedule from here on; of the base", flag="--denoising-end",
        metavar="F", group=XL, tasks=NOT_INVERT)
    """The base model ends where the refiner starts, and hands it its latents."""

    def __post_init__(self) -> None:
        check_options(self)
        for prompt in (self.prompt, self.negative_prompt or "") if self.prompt_style == "weighted" else ():
            parse(prompt)
        if self.seed is not None:
            whole(0, MAX_SEED - self.count + 1)("seed", self.seed)
        if self.latents is not None:
            object.__setattr__(self, "latents", checks.latents("latents", self.latents, self.count))

    @property
    def guided(self) -> bool:
        """Return whether the model also runs on the negative prompt (diffusers' rule: guidance above 1)."""
        return self.guidance > 1.0

    def to_json(self) -> dict[str, Any]:
        """Return every option that JSON can hold and is not the default; true for what was given by hand."""
        return stored(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the request of `to_json`. Raises ValueError for unknown keys, and for what was given by hand."""
        declared = {name: declaration for name, declaration in options_of(cls).items() if declaration.store}
        if unknown := set(data) - set(declared):
            raise ValueError(f"request: got unknown options {sorted(unknown)}, expected some of {sorted(declared)}")
        by_hand = [name for name, declaration in declared.items()
                   if declaration.store is origin and data.get(name) is True]
        by_hand += [f"control {net['name']}" for net in data.get("control", ()) if net.get("image") is True]
        if by_hand:
            raise ValueError(f"request: its {' and '.join(by_hand)} were given by hand, which are not stored; "
                             "pass the same ones through the Python interface to repeat it")
        return cls(**data)
