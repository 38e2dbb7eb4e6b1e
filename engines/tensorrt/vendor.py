"""TensorRT's package in its two flavours, and the objects of ours that it calls back: a logger, a progress monitor.

Versions 10.13 to 11.4, and TensorRT-RTX, have different names. Which of them a package has is asked here, and nowhere
else: its version does not tell, for the two flavours count theirs apart, and the enterprise wheel may be stubs alone.
"""

from __future__ import annotations

import functools
import json
import re
from typing import IO, TYPE_CHECKING, Any

from engines.machine.vendor import importing
from engines.spec import EngineError

if TYPE_CHECKING:
    import tensorrt as rt

ENTERPRISE, RTX = "tensorrt", "tensorrt-rtx"
PIP = {ENTERPRISE: "pip install tensorrt-cu13", RTX: "pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings"}
"""Flavour, a name of `engines.backend.BACKENDS` → how to install it."""


def package(flavour: str) -> Any:
    """Return the package of a flavour. Raises EngineError with the pip line where it is missing."""
    with importing(flavour, PIP[flavour]):
        if flavour == RTX:
            import tensorrt_rtx_bindings as trt
        else:
            import tensorrt as trt
    if not hasattr(trt, "Builder"):  # tensorrt-stubs alone makes `import tensorrt` an empty package
        raise EngineError(f"backend {flavour}: got type stubs only, expected the package; run: {PIP[flavour]}")
    return trt


def plugin_package(flavour: str) -> Any:
    """Return the module for plugins written in Python. Raises EngineError where it is missing or too old."""
    try:
        import tensorrt.plugin
    except ModuleNotFoundError as e:
        raise EngineError(f"backend {flavour}: got no plugins in Python ({e}), expected those of TensorRT 10.13 "
                          "or later; pass --attention vendor --norm vendor") from e
    if not hasattr(tensorrt.plugin, "aot_impl"):
        raise EngineError(f"got TensorRT {package(flavour).__version__} without ahead-of-time plugins, expected 10.13 "
                          "or later; update it, or pass --attention vendor --norm vendor")
    return tensorrt.plugin


def network_flags(trt: Any) -> int:
    """Return what `Builder.create_network` takes for a strongly typed network, which is the only kind from 11 on."""
    flag = trt.NetworkDefinitionCreationFlag.__members__.get("STRONGLY_TYPED")
    return 0 if flag is None else 1 << int(flag)


def attention_layer(trt: Any) -> Any:
    """Return the type of the layers that read the inputs of an attention, None before TensorRT 10.14."""
    return trt.LayerType.__members__.get("ATTENTION_INPUT")


def architectures(trt: Any) -> list[str]:
    """Return the architectures ("sm_89") that TensorRT-RTX builds for, the oldest first."""
    names = trt.ComputeCapability.__members__
    return sorted((n.replace("SM", "sm_") for n in names if re.fullmatch(r"SM\d+", n)), key=lambda n: int(n[3:]))


def dims(shape: rt.Dims) -> tuple[int, ...]:
    """Return a shape of TensorRT as a tuple."""
    return tuple(shape[n] for n in range(len(shape)))


@functools.cache
def log(trt: Any) -> Any:
    """Return the logger of this process: TensorRT keeps the first that it is given.

    It remembers `errors`, `warnings`, and `memory`, bytes by what for; `why()` says what went wrong, once.
    """

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.memory: dict[str, int] = {}

        def log(self, severity: Any, message: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                self.errors.append(message)
            elif severity.name == "WARNING":
                self.warnings.append(message)
            elif size := re.fullmatch(r"(?:Total|Max) (\w+) Memory: (\d+) bytes", message):
                self.memory[size[1].lower()] = int(size[2])

        def why(self) -> str:
            errors, self.errors = self.errors, []
            return errors[0].strip() if errors else "it did not say why"

    return Log()


def monitor(trt: Any, tell: IO[str]) -> Any:
    """Return a monitor that writes how far a build is to `tell`, a JSON message a line: {phase, percent}."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, list[int]] = {}  # name → [steps, steps done], outermost first
            self.told: tuple[str, int] | None = None

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases[name] = [steps, 0]
            self.tell()

        def step_complete(self, name: str, step: int) -> bool:
            if name in self.phases:
                self.phases[name][1] = step + 1
            return self.tell()

        def phase_finish(self, name: str) -> None:
            self.phases.pop(name, None)

        def tell(self) -> bool:
            """Return False, which stops the build, where nobody listens any more.

            Phases nest: a step of one is done when the phases inside it are.
            """
            fraction = 0.0
            for steps, done in reversed(self.phases.values()):
                fraction = min(1.0, (done + fraction) / steps)
            if self.phases and self.told != (now := (list(self.phases)[-1], int(100 * fraction))):
                self.told = now
                try:
                    print(json.dumps({"phase": now[0], "percent": now[1]}), file=tell)
                except BrokenPipeError:
                    return False
            return True

    return Monitor()
