"""LoRAs that a request asks for. `runtime.lora` reads their files and puts them on engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Self

from runtime.request.checks import Check, boolean, number
from runtime.request.option import check_options, option, options_of, stored


def _path(name: str, value: object) -> str:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError(f"lora: got {value!r}, expected the path of a .safetensors file")
    return str(value)


@dataclass(frozen=True)
class Lora:
    """A LoRA is one adapter of a request. Raises ValueError for a value that cannot be."""

    path: str = option(MISSING, Check(_path, metavar="FILE"), "a .safetensors file of diffusers, PEFT or kohya's")
    scale: float = option(1.0, number(), "how much of it, any finite number")
    text_scale: float | None = option(None, number(), "the same for the text encoders", unset="scale")
    strict: bool = option(True, boolean(), "refuse a file of which part fits no weight of the model; without, that "
                          "part is left out")

    def __post_init__(self) -> None:
        check_options(self, f"lora {self.path}: ")

    @classmethod
    def parse(cls, text: str, strict: bool = True) -> Self:
        """Return what "FILE" or "FILE:SCALE" means on the command line. Raises ValueError."""
        path, colon, scale = text.rpartition(":")
        try:
            return cls(path, float(scale), strict=strict) if colon else cls(text, strict=strict)
        except ValueError:
            if colon and Path(text).exists():
                return cls(text, strict=strict)
            raise ValueError(f"lora: got {text!r}, expected FILE or FILE:SCALE, as style.safetensors:0.7") from None

    def to_json(self) -> dict[str, Any]:
        """Return every option that is not the default."""
        return stored(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the LoRA of `to_json`. Raises ValueError for unknown keys."""
        if unknown := set(data) - set(options_of(cls)):
            raise ValueError(f"lora: got unknown options {sorted(unknown)}, expected {', '.join(options_of(cls))}")
        return cls(**data)

    def scale_for(self, of_text: bool) -> float:
        """Return the scale for the denoiser, or for text encoders."""
        return self.text_scale if of_text and self.text_scale is not None else self.scale


def _loras(name: str, value: Any) -> tuple[Lora, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name}: got {value!r}, expected a list of them, as [Lora('style.safetensors', 0.7)]")
    return tuple(lora if isinstance(lora, Lora) else Lora.from_json(lora) if isinstance(lora, Mapping) else Lora(lora)
                 for lora in value)


LORAS = Check(_loras, Lora.parse, "FILE[:SCALE]")
"""A list of LoRAs, of their paths, or of what `Lora.to_json` gives; kept as a tuple of LoRAs."""
