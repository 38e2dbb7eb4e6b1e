"""The options of the openvino backend, from a config's to what they decide on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from engines.openvino import extension
from engines.spec import KINDS, WHOSE, EngineConfig, EngineError


@dataclass(frozen=True)
class Options:
    """The options are what a config's `options` decide.

    ours: kinds of sites whose kernels are ours. properties: the other options, which are properties of OpenVINO's CPU
    plugin, values by name.
    """

    ours: frozenset[str]
    properties: Mapping[str, Any]

    @classmethod
    def read(cls, config: EngineConfig) -> Self:
        """Raises EngineError for a kind of site or a value that is none of these, and for "ours" where that cannot be.

        "auto" is ours wherever our kernels can be used, without a measurement.
        """
        if strange := [kind for kind in KINDS if kind in config.options and kind not in extension.OPS]:
            raise EngineError(f"openvino: got option {strange[0]!r}, expected {', '.join(extension.OPS)} or a property "
                              "of OpenVINO's CPU plugin; leave it out")
        return cls(frozenset(kind for kind in extension.OPS if _is_ours(config, kind)),
                   {name: value for name, value in config.options.items() if name not in extension.OPS})


def _is_ours(config: EngineConfig, kind: str) -> bool:
    wanted = config.options.get(kind, "auto")
    if wanted not in WHOSE:
        raise EngineError(f"option {kind}: got {wanted!r}, expected ours, vendor or auto")
    if wanted == "vendor":
        return False
    reason = extension.missing() or ("got dtype fp16, expected fp32 or bf16" if config.dtype == "fp16" else None)
    if wanted == "ours" and reason:
        raise EngineError(f"option {kind}: {reason}")
    return reason is None
