"""LoRAs on the engines of a bundle: which ones a request wants, and weights that follow them.

W' = W + Σ scale · factor · up · down (`runtime.lora.files`), in float32, rounded once to what the engine stores. The
base weights are read from the bundle, so that to take a LoRA away is to write what was there before, to the bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from weakref import WeakKeyDictionary

import numpy as np

from engines import Bundle, EngineError
from engines.onnx.initializers import values
from engines.onnx.low_rank import LowRank, constant
from runtime.devices.bound import BoundEngine
from runtime.lora.files import LoraFile, Pair, Weights, read_lora, weights_of

FILES = 8
"""Files whose contents are kept."""


@dataclass(frozen=True)
class Lora:
    """One LoRA of a request.

    path: a .safetensors file of diffusers, PEFT or kohya's. scale: how much of it, any finite number; text_scale: the
    same for the text encoders, `scale` unless given. strict: refuse a file of which part fits no weight of the model;
    without, that part is left out.
    """

    path: str
    scale: float = 1.0
    text_scale: float | None = None
    strict: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | Path) or not str(self.path):
            raise ValueError(f"lora: got {self.path!r}, expected the path of a .safetensors file")
        object.__setattr__(self, "path", str(self.path))
        for name in ("scale", "text_scale"):
            value = getattr(self, name)
            if value is None and name == "text_scale":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"lora {self.path}: {name}: got {value!r}, expected a finite number")
        if not isinstance(self.strict, bool):
            raise ValueError(f"lora {self.path}: strict: got {self.strict!r}, expected True or False")

    @classmethod
    def parse(cls, text: str, strict: bool = True) -> Self:
        """"FILE" or "FILE:SCALE", as the command line has it. Raises ValueError."""
        path, colon, scale = text.rpartition(":")
        try:
            return cls(path, float(scale), strict=strict) if colon else cls(text, strict=strict)
        except ValueError:
            if colon and Path(text).exists():
                return cls(text, strict=strict)
            raise ValueError(f"lora: got {text!r}, expected FILE or FILE:SCALE, as style.safetensors:0.7") from None

    def to_json(self) -> dict[str, Any]:
        """Every field that is not the default."""
        return {f.name: value for f in dataclasses.fields(self) if (value := getattr(self, f.name)) != f.default}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`. Raises ValueError for unknown keys."""
        if unknown := set(data) - {f.name for f in dataclasses.fields(cls)}:
            raise ValueError(f"lora: got unknown options {sorted(unknown)}, expected path, scale, text_scale, strict")
        return cls(**data)

    def scale_of(self, model: str) -> float:
        """For "unet" or the name of a text encoder."""
        return self.scale if model == "unet" or self.text_scale is None else self.text_scale


def as_loras(value: Any) -> tuple[Lora, ...]:
    """From a list of LoRAs, paths, or what `Lora.to_json` gives. Raises ValueError for anything else."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"loras: got {value!r}, expected a list of them, as [Lora('style.safetensors', 0.7)]")
    return tuple(lora if isinstance(lora, Lora) else Lora.from_json(lora) if isinstance(lora, Mapping) else Lora(lora)
                 for lora in value)


@dataclass(frozen=True)
class _Applied:
    """What an engine has: LoRAs and their files (None while that is not known), and weights that are not the base's."""

    state: tuple[tuple[Lora, LoraFile], ...] | None
    changed: frozenset[str]


class Loras:
    """The LoRAs in use of one bundle, and its engines with them.

        loras = Loras(bundle)
        loras.use(request.loras)                        # reads and checks the files; changes no engine
        engine = loras.fit("unet_body", engine)         # whenever an engine is about to run

    An engine is refitted when it is about to run with other LoRAs than it ran with, and only where they differ from
    the base weights before or after. Whatever has been computed of a text, an engine of `unet_text` included, is of the
    LoRAs that were in use then.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._state: tuple[tuple[Lora, LoraFile], ...] = ()
        self._files: dict[tuple[str, int, int], LoraFile] = {}
        self._models: dict[str, Weights] | None = None
        self._base: dict[str, Mapping[str, np.ndarray]] = {}
        self._applied: WeakKeyDictionary[BoundEngine, _Applied] = WeakKeyDictionary()

    def check(self, loras: Sequence[Lora]) -> None:
        """Raise ValueError for a file that cannot be used, or does not fit the model."""
        for lora in loras:
            self._read(lora)

    def use(self, loras: Sequence[Lora]) -> None:
        """From now on, in every engine that `fit` is given. Raises ValueError as `check` does; then nothing changes."""
        self._state = tuple((lora, self._read(lora)) for lora in loras)

    def fit(self, component: str, engine: BoundEngine) -> BoundEngine:
        """`engine`, of this component of the bundle, with the weights of the LoRAs in use.

        Raises EngineError where its backend cannot change them.
        """
        before = self._applied.get(engine, _Applied((), frozenset()))
        if before.state == self._state:
            return engine
        model = self._bundle.component(component).network
        wanted = frozenset(name for _, file in self._state for name in file.pairs.get(model, ()))
        names: frozenset[str] = frozenset()
        if before.changed or wanted:
            base = self._weights(component)
            names = (before.changed | wanted) & base.keys()
        if names:
            self._applied[engine] = _Applied(None, names)
            active = [(lora.scale_of(model), file.pairs.get(model, {})) for lora, file in self._state]
            weights = {name: _with(base[name], [(scale, pairs[name]) for scale, pairs in active if name in pairs])
                       for name in sorted(names)}
            try:
                engine.refit(weights)
            except EngineError:
                self._applied[engine] = before  # as `engines.spec.Engine` promises
                raise
        self._applied[engine] = _Applied(self._state, wanted & names)
        return engine

    def _read(self, lora: Lora) -> LoraFile:
        path = Path(lora.path)
        if not path.is_file():
            raise ValueError(f"lora: got {lora.path}, expected a .safetensors file; there is none")
        about = path.stat()
        key = (str(path.resolve()), about.st_mtime_ns, about.st_size)
        if key not in self._files:
            self._models = self._models or weights_of(self._bundle)
            self._files[key] = read_lora(path, self._models)
            while len(self._files) > FILES:
                self._files.pop(next(iter(self._files)))
        file = self._files[key] = self._files.pop(key)
        if lora.strict and file.unmatched:
            shown, rest = file.unmatched[:5], len(file.unmatched) - 5
            raise ValueError(f"lora {path}: got {len(file.unmatched)} keys that fit no weight of this "
                             f"{self._bundle.manifest.family} model ({', '.join(shown)}"
                             f"{f' and {rest} more' if rest > 0 else ''}), expected none; take a file that was made "
                             "for this model, or pass strict=False to leave them out")
        if not any(file.pairs.values()):
            raise ValueError(f"lora {path}: got no weight of this {self._bundle.manifest.family} model, expected some; "
                             "take a file that was made for it")
        return file

    def _weights(self, component: str) -> Mapping[str, np.ndarray]:
        if component not in self._base:
            self._base[component] = values(self._bundle.path / self._bundle.component(component).file)
        return self._base[component]


def _with(base: np.ndarray, pairs: Sequence[tuple[float, Pair]]) -> LowRank:
    """A weight and its pairs, each with its scale."""
    up = [np.float32(scale * pair.factor) * pair.up for scale, pair in pairs]
    if not up:
        return constant(base)
    return LowRank(np.ascontiguousarray(base), np.ascontiguousarray(np.concatenate(up, axis=1)),
                   np.concatenate([pair.down for _, pair in pairs]))
