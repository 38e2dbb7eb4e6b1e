"""LoRAs on the engines of a bundle: which ones a request wants, and weights that follow them.

W' = W + Σ scale · factor · up · down (`runtime.lora.files`), in float32, rounded once to what the engine stores. The
base weights are read from the bundle, so that to take a LoRA away is to write what was there before, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np

from engines import Bundle, EngineError
from engines.onnx.initializers import values
from engines.onnx.low_rank import LowRank, constant
from runtime.devices.bound import BoundEngine
from runtime.lora.files import LoraFile, Pair, Weights, read_lora, weights_of
from runtime.request.lora import Lora

FILES = 8
"""Files whose contents are kept."""


Stack = tuple[tuple[Lora, LoraFile], ...]
"""LoRAs and what is in their files, in the order in which they were asked for; empty for the model's own weights."""


@dataclass(frozen=True)
class _Applied:
    """The state of an engine: a stack (None while unknown), and the names of weights that are not the base's."""

    stack: Stack | None
    changed: frozenset[str]


class Loras:
    """The LoRAs of one bundle's requests, and its engines with them.

        loras = Loras(bundle)
        stack = loras.read(request.loras)                   # reads the files; changes no engine
        engine = loras.fit("unet_body", engine, stack)      # whenever an engine is about to run

    An engine is refitted when it is about to run with another stack than it ran with, and only where that differs from
    the base weights before or after. What has been computed of a text, by an engine of `unet_text` too, is of the stack
    that the engine had then.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._files: dict[tuple[str, int, int], LoraFile] = {}
        self._models: dict[str, Weights] | None = None
        self._base: dict[str, Mapping[str, np.ndarray]] = {}
        self._applied: WeakKeyDictionary[BoundEngine, _Applied] = WeakKeyDictionary()

    def read(self, loras: Sequence[Lora]) -> Stack:
        """Return the stack of these LoRAs. Raises ValueError for a file that is damaged, or does not fit the model."""
        return tuple((lora, self._read(lora)) for lora in loras)

    def fit(self, component: str, engine: BoundEngine, stack: Stack) -> BoundEngine:
        """Return `engine`, of this component of the bundle, with the weights of a stack.

        Raises EngineError where its backend cannot change weights; then nothing changes.
        """
        before = self._applied.get(engine, _Applied((), frozenset()))
        if before.stack == stack:
            return engine
        about = self._bundle.component(component)
        model, of_text = about.network, about.role == "text_encoder"
        wanted = frozenset(name for _, file in stack for name in file.pairs.get(model, ()))
        names: frozenset[str] = frozenset()
        if before.changed or wanted:
            base = self._weights(component)
            names = (before.changed | wanted) & base.keys()
        if names:
            self._applied[engine] = _Applied(None, names)
            active = [(lora.scale_for(of_text), file.pairs.get(model, {})) for lora, file in stack]
            weights = {name: _with(base[name], [(scale, pairs[name]) for scale, pairs in active if name in pairs])
                       for name in sorted(names)}
            try:
                engine.refit(weights)
            except EngineError:
                self._applied[engine] = before  # as `engines.backend.Engine` promises
                raise
        self._applied[engine] = _Applied(stack, wanted & names)
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
