"""The options of both flavours, from a config's to numbers, and whose kernels they ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from engines.spec import WHOSE, EngineError
from engines.tensorrt import vendor

KINDS = {"attention": "Attention", "norm": "GroupNormalization"}
"""Kind of site that can be nodes of our own in an engine → the operator that is one."""
EXPECTED = {**dict.fromkeys(KINDS, "ours, vendor or auto"), "refit": "true or false", "stripped": "true or false",
            "optimization_level": "0 to 5", "workspace": "MiB, at least 1"}
"""Option → the values that it takes, in words."""


@dataclass(frozen=True)
class Options:
    """The config's options.

    refit: weights can change. stripped: the plan is without weights, which are read from the ONNX file at load.
    optimization_level: of TensorRT's builder, None for its own choice. workspace: most scratch memory that one layer
    may take, in MiB. kernels: kind of KINDS → one of WHOSE, where the config says.
    """

    refit: bool = False
    stripped: bool = False
    optimization_level: int | None = None
    workspace: int | None = None
    kernels: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> Self:
        """Raises EngineError for a name or a value that is not one of these."""
        values: dict[str, Any] = {}
        kernels: dict[str, str] = {}
        for name, value in options.items():
            if name not in EXPECTED:
                raise EngineError(f"tensorrt: got option {name!r}, expected one of {', '.join(EXPECTED)}")
            if (read := _value(name, str(value).lower())) is None:
                raise EngineError(f"option {name}: got {value!r}, expected {EXPECTED[name]}")
            (kernels if name in KINDS else values)[name] = read
        return cls(**values, kernels=kernels)

    @property
    def flags(self) -> tuple[str, ...]:
        """Names of TensorRT's BuilderFlags."""
        flags = ("REFIT",) if self.refit else ("REFIT_IDENTICAL",) if self.stripped else ()
        return (*flags, "STRIP_PLAN") if self.stripped else flags

    def asked(self, flavour: str) -> dict[str, str]:
        """Return kind of KINDS → one of WHOSE, for a flavour: auto by default, vendor where it cannot be ours.

        Raises EngineError where ours, or auto, is asked for and cannot be.
        """
        reason = ("TensorRT-RTX has no plugins in Python; use --backend tensorrt" if flavour == vendor.RTX else
                  "a stripped plan reads its weights from the ONNX file, which has no plugin nodes; pass "
                  "--option stripped=false" if self.stripped else None)
        for kind, wanted in self.kernels.items():
            if reason and wanted != "vendor":
                raise EngineError(f"option {kind}: got {wanted!r}, expected vendor: {reason}")
        return {kind: "vendor" if reason else self.kernels.get(kind, "auto") for kind in KINDS}


def _value(name: str, text: str) -> Any:
    """Return the value that `text` says, None for one that the option does not take."""
    if name in KINDS:
        return text if text in WHOSE else None
    if name in ("refit", "stripped"):
        return {"true": True, "false": False}.get(text)
    fits = text.isdecimal() and (int(text) <= 5 if name == "optimization_level" else int(text) >= 1)
    return int(text) if fits else None
