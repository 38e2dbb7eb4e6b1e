"""The options of the inductor backend, from a config's to values, and what a machine can do of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engines.spec import EngineConfig, EngineError
from kernels.cpu import library

KERNELS = ("attention", "group_norm", "layer_norm", "geglu")
"""Kinds of sites that our kernels can do: in Triton, on a GPU."""
NATIVE = KERNELS[:2]
"""Those that there are in C++ too, for CPUs."""
LEAST = 640
"""Linear layers of fewer rows, inputs or outputs stay in the engine's dtype, unless the config says otherwise: there a
product is shorter than quantising what it reads. A guess, until a GPU has measured it."""
OLDEST = 89
"""Compute capability from which tensor cores multiply float8."""


@dataclass(frozen=True)
class Options:
    """The config's options. kernels: kind of KERNELS → latentrt, torch or auto. fp8_least: None for no float8."""

    kernels: Mapping[str, str]
    fuse: bool
    max_autotune: bool
    fp8_least: int | None

    @classmethod
    def read(cls, config: EngineConfig) -> Options:
        """Raises EngineError for a name or a value that is not one of these."""
        on_gpu = config.device.startswith("cuda")
        flags = {"fuse": True, "max_autotune": on_gpu}
        missing = None if on_gpu else library.available()
        ours = KERNELS if on_gpu else () if missing else NATIVE
        kernels = {kind: "auto" if kind in ours else "torch" for kind in KERNELS}
        fp8, least = False, LEAST
        for name, value in config.options.items():
            text = str(value).lower()
            if name in KERNELS:
                if text not in ("latentrt", "torch", "auto"):
                    raise EngineError(f"option {name}: got {value!r}, expected latentrt, torch or auto")
                if text != "torch" and name not in ours:
                    raise EngineError(f"option {name}: got {text} on {config.device}, expected torch: " + (
                        missing if missing and name in NATIVE else "that kernel of ours is for GPUs"))
                kernels[name] = text
            elif name == "fp8":
                if text not in ("linear", "none"):
                    raise EngineError(f"option fp8: got {value!r}, expected linear or none")
                fp8 = text == "linear"
            elif name == "fp8_least":
                if not text.isdecimal() or int(text) < 1:
                    raise EngineError(f"option fp8_least: got {value!r}, expected a whole number of at least 1")
                least = int(text)
            elif name in flags:
                if text not in ("true", "false"):
                    raise EngineError(f"option {name}: got {value!r}, expected true or false")
                flags[name] = text == "true"
            else:
                raise EngineError(f"inductor: got option {name!r}, expected one of "
                                  f"{', '.join((*KERNELS, 'fp8', 'fp8_least', *flags))}")
        return cls(kernels, **flags, fp8_least=least if fp8 else None)


def check_fp8(arch: str) -> None:
    """Raises EngineError for an architecture ("sm_86") that does not multiply float8."""
    if int(arch.removeprefix("sm_")) < OLDEST:
        raise EngineError(f"option fp8: got linear on {arch}, expected sm_{OLDEST} (Ada) or later, whose tensor cores "
                          "multiply float8; leave --option fp8=linear out")
