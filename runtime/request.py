"""What a user asks for: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Self

import numpy as np

from runtime.lora import Lora

OUTPUTS = ("image", "latent")
MAX_SEED = 2**64 - 1


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

    prompt, negative_prompt: text; tokens past the encoder's length are dropped with a warning.
    height, width: pixels; None takes the size the pipeline was loaded with.
    steps: solver steps. guidance: classifier-free guidance scale (arXiv 2207.12598); at 1 or below the model runs
    without it, in half the rows. guidance_rescale: phi of arXiv 2305.08891 section 3.4, 0 to 1.
    scheduler: a short name or diffusers class name (`runtime.schedulers`), None for the checkpoint's own.
    eta: DDIM's noise share, 0 to 1. timesteps: the solver's timesteps instead of `steps` evenly chosen ones.
    seed: 0 … 2**64 - 1; image i of `count` uses seed + i, with the noise torch's CPU generator gives; None draws one.
    latents: float32 [C, h, w] or [count, C, h, w] of unit variance to start from, in place of noise.
    loras: LoRAs on the UNet and text encoders, of `runtime.lora.Lora` or paths; none by default.
    output: "image", or "latent" to stop before decoding.
    on_step: called with a `Step` after every evaluation; returning False cancels the request.

    Raises ValueError for a value that cannot be.
    """

    prompt: str
    negative_prompt: str = ""
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

    def __post_init__(self) -> None:
        _text("prompt", self.prompt)
        _text("negative_prompt", self.negative_prompt)
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1, 2**16)
        _whole("steps", self.steps, 1, 10_000)
        _whole("count", self.count, 1, 10_000)
        _number("guidance", self.guidance, 0.0, math.inf)
        _number("guidance_rescale", self.guidance_rescale, 0.0, 1.0)
        _number("eta", self.eta, 0.0, 1.0)
        if self.seed is not None:
            _whole("seed", self.seed, 0, MAX_SEED - self.count + 1)
        if self.scheduler is not None and not isinstance(self.scheduler, str):
            raise ValueError(f"scheduler: got {self.scheduler!r}, expected a name such as 'ddim', or None")
        if self.output not in OUTPUTS:
            raise ValueError(f"output: got {self.output!r}, expected one of {', '.join(OUTPUTS)}")
        if self.timesteps is not None:
            object.__setattr__(self, "timesteps", _timesteps(self.timesteps))
        if self.latents is not None:
            object.__setattr__(self, "latents", _latents(self.latents, self.count))
        object.__setattr__(self, "loras", _loras(self.loras))
        if self.on_step is not None and not callable(self.on_step):
            raise ValueError(f"on_step: got {self.on_step!r}, expected a function of one Step")

    @property
    def guided(self) -> bool:
        """Whether the model also runs on the negative prompt (diffusers' rule: guidance above 1)."""
        return self.guidance > 1.0

    def to_json(self) -> dict[str, Any]:
        """Every field that JSON can hold and is not the default; `latents` is true where some were given."""
        out: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name == "latents":
                if value is not None:
                    out["latents"] = True
            elif f.name == "loras":
                if value:
                    out["loras"] = [lora.to_json() for lora in value]
            elif f.name != "on_step" and (f.default is dataclasses.MISSING or value != f.default):
                out[f.name] = list(value) if isinstance(value, tuple) else value
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`. Raises ValueError for unknown keys, and where the latents were given by hand."""
        known = {f.name for f in dataclasses.fields(cls)} - {"on_step"}
        if unknown := set(data) - known:
            raise ValueError(f"request: got unknown options {sorted(unknown)}, expected some of {sorted(known)}")
        if "latents" in data:
            raise ValueError("request: it started from latents given by hand, which are not stored; "
                             "pass the same latents through the Python interface to repeat it")
        return cls(**data)


def _text(name: str, value: object) -> None:
    if not isinstance(value, str):
        hint = "; pass a list of Requests for several prompts" if isinstance(value, (list, tuple)) else ""
        raise ValueError(f"{name}: got {type(value).__name__}, expected a string{hint}")


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise ValueError(f"{name}: got {value!r}, expected a whole number from {low} to {high}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)) \
            or not math.isfinite(value) or not low <= value <= high:
        span = f"of at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
        raise ValueError(f"{name}: got {value!r}, expected a number {span}")


def _loras(value: Any) -> tuple[Lora, ...]:
    """From LoRAs, paths, or what `Lora.to_json` gives."""
    if isinstance(value, str | Lora) or not isinstance(value, Sequence):
        raise ValueError(f"loras: got {value!r}, expected a list of them, as [Lora('style.safetensors', 0.7)]")
    return tuple(lora if isinstance(lora, Lora) else Lora.from_json(lora) if isinstance(lora, Mapping) else Lora(lora)
                 for lora in value)


def _timesteps(value: Any) -> tuple[int, ...]:
    try:
        steps = tuple(int(t) for t in value)
    except (TypeError, ValueError) as e:
        raise ValueError(f"timesteps: got {value!r}, expected whole numbers, highest first") from e
    if not steps or any(a <= b for a, b in pairwise(steps)):
        raise ValueError(f"timesteps: got {steps}, expected whole numbers, each below the one before it")
    return steps


def _latents(value: Any, count: int) -> np.ndarray:
    array = np.asarray(value, np.float32)
    if array.ndim == 3:
        array = np.broadcast_to(array, (count, *array.shape))
    if array.ndim != 4 or array.shape[0] != count:
        raise ValueError(f"latents: got shape {tuple(np.shape(value))}, expected [channels, height, width] in latents, "
                         f"or that for each of the {count} images")
    if not np.isfinite(array).all():
        raise ValueError("latents: got NaN or infinite values, expected finite numbers of about unit variance")
    return array
