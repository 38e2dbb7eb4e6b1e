"""Which backend `auto` means on this machine, and in which precision, and why."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import engines
from engines import store, verify
from engines.bundle import Bundle
from engines.gpu import gpus
from engines.show import duration
from engines.spec import DTYPES, EngineConfig, EngineError

PREFERENCE = {"cuda": ("tensorrt", "tensorrt-rtx", "inductor"), "cpu": ("openvino", "inductor", "onnxruntime")}
"""Kind of device, a GPU before the CPU → backends, the one that is usually fastest there first."""

UNET = "unet"
log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """What "auto" has become. why: the reason, in words."""

    backend: str
    dtype: str
    device: str
    why: str


class Candidate(NamedTuple):
    """What could be chosen."""

    backend: str
    dtype: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend} {self.dtype}"


def choose(backend: str = "auto", dtype: str = "auto", *, bundle: Bundle | None = None,
           size: tuple[int, int] | None = None, batch: int = 1, device: str = "auto", threads: int = 0,
           build: bool = False) -> Choice:
    """Fill in "auto": the backend, device and precision that are preferred here, unless another measured faster.

    Preferred is the first of PREFERENCE that is installed and whose device this machine has, in the precision that it
    prefers there, which on a GPU is that of the graph. Engines of the bundle's UNet for `batch` pictures of `size`
    (height, width; the model's own by default) with guidance that were measured on this machine overrule that, but only
    where the preferred one is among them: what was never built is not known to be slower. build: the engine need not
    run here, so `device` may be the architecture of a GPU that is elsewhere.

    Raises EngineError for names that are not known, and where no backend can be used.
    """
    if dtype not in ("auto", *DTYPES):
        raise EngineError(f"dtype: got {dtype!r}, expected auto or one of {', '.join(DTYPES)}")
    usable = _usable(device, dtype, build) if backend == "auto" else [_asked_for(backend, device)]
    first, its_device = usable[0]
    preferred = Candidate(first, _dtype(first, dtype, bundle), its_device)
    measured = _measured(bundle, usable, dtype, size, batch, threads) if bundle else {}
    chosen = min(measured, key=measured.__getitem__) if preferred in measured else preferred
    why = _why(chosen, measured, "asked for" if backend != "auto" else "preferred of what can be used here")
    if "auto" in (backend, dtype):
        log.info("backend %s, computing in %s on %s: %s", chosen.backend, chosen.dtype, chosen.device, why)
    return Choice(*chosen, why)


def _why(chosen: Candidate, measured: dict[Candidate, float], otherwise: str) -> str:
    others = ", ".join(f"{one} {duration(measured[one])}" for one in sorted(measured, key=measured.__getitem__)
                       if one != chosen)
    if chosen not in measured:
        return otherwise + (f"; not measured here yet, unlike {others}" if others else "")
    return f"{duration(measured[chosen])} a UNet call, " + (
        f"the fastest measured here ({others})" if others else "the only one measured here")


def _usable(device: str, dtype: str, build: bool) -> list[tuple[str, str]]:
    """(backend, device) of every backend that can be used, the preferred first."""
    found, missing = [], []
    for kind, names in PREFERENCE.items():
        for name in names:
            if name in engines.BACKENDS and (device == "auto" or (kind == "cpu") == device.startswith("cpu")):
                try:
                    found.append((name, _device(name, kind, device, build)))
                except EngineError as e:
                    missing.append(str(e))
    if not found:
        raise EngineError("no engine can be used: " + "; ".join(missing))
    return [one for one in found if dtype in ("auto", *engines.backend(one[0]).dtypes())] or found


def _device(name: str, kind: str, device: str, build: bool) -> str:
    """The device that backend `name` would use. Raises EngineError where it can use none."""
    module = engines.backend(name)
    if reason := module.available():
        raise EngineError(reason)
    known = module.devices()
    if device == "auto":
        device = next((one for one in known if one.partition(":")[0] == kind), kind)
    if device not in known and not ("cuda:0" in known and device in {gpu.arch for gpu in gpus()}):
        raise EngineError(f"backend {name}: got device {device}, expected one of {', '.join(known)}")
    if not build and (reason := module.runnable(EngineConfig(name, device=device))):
        raise EngineError(f"backend {name}: {reason}")
    return device


def _asked_for(backend: str, device: str) -> tuple[str, str]:
    module = engines.backend(backend)
    if reason := module.available():
        raise EngineError(reason)
    return backend, device if device != "auto" else "cuda:0" if module.ON_GPU else "cpu"


def _dtype(backend: str, dtype: str, bundle: Bundle | None) -> str:
    if dtype != "auto":
        return dtype
    module = engines.backend(backend)
    return bundle.component(UNET).dtype if module.ON_GPU and bundle else str(module.dtypes()[0])


def _measured(bundle: Bundle, usable: list[tuple[str, str]], dtype: str, size: tuple[int, int] | None, batch: int,
              threads: int) -> dict[Candidate, float]:
    """Seconds of a call of every engine that would be used here and was measured here."""
    height, width = size or bundle.manifest.default_size
    here = verify.machines()
    found = {}
    for path in store.engine_directories(bundle):
        record = _record(path) if path.name.startswith(f"{UNET}-") else None
        if record is None or record.component != UNET or record.timing is None or record.timing.machine not in here:
            continue
        own = record.config
        if (own.backend, own.device) not in usable or dtype not in ("auto", own.dtype):
            continue
        wanted = bundle.config(UNET, backend=own.backend, dtype=own.dtype, device=own.device, threads=threads,
                               height=height, width=width, batch=2 * batch)
        if own == wanted and store.stale(bundle, record) is None:
            found[Candidate(own.backend, own.dtype, own.device)] = record.timing.seconds
    return found


def _record(path: Path) -> store.Record | None:
    try:
        return store.Record.read(path, "")
    except EngineError:
        return None  # whoever loads it is told
