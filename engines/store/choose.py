"""Which backend, device and precision `auto` means on this machine, and why."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from engines.backend import BACKENDS
from engines.backend import backend as opened
from engines.bundle import Bundle
from engines.check import compare
from engines.machine.gpu import gpus
from engines.spec import DTYPES, EngineConfig, EngineError
from engines.store.places import engine_directories
from engines.store.record import Record, stale
from engines.store.words import duration

PREFERENCE = {"cuda": ("tensorrt", "tensorrt-rtx", "inductor"), "cpu": ("openvino", "onnxruntime", "inductor")}
"""Kind of device, a GPU before the CPU → backends, the one to be preferred first: it is usually the fastest there."""

logger = logging.getLogger(__name__)


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


def choose(backend: str = "auto", dtype: str = "auto", device: str = "auto", *, bundle: Bundle | None = None,
           size: tuple[int, int] | None = None, batch: int = 1, threads: int = 0, build: bool = False) -> Choice:
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
    device = "cuda:0" if device == "cuda" else device
    preferred = _preferred(backend, dtype, device, bundle, build)
    times = _measured(bundle, size, batch, threads) if bundle else {}
    times = {one: seconds for one, seconds in times.items() if _matches(one, backend, dtype, device)}
    chosen = preferred
    if preferred in times:  # the others are looked at from the fastest on, and no further than need be
        chosen = next(one for one in times if one == preferred or _is_usable(one, build))
    why = _why(chosen, times, "asked for" if backend != "auto" else "preferred of what can be used here")
    if "auto" in (backend, dtype):
        logger.info("backend %s, computing in %s on %s: %s", *chosen, why)
    return Choice(*chosen, why)


def _preferred(backend: str, dtype: str, device: str, bundle: Bundle | None, build: bool) -> Candidate:
    name, own = _asked_for(backend, device) if backend != "auto" else _first(dtype, device, build)
    if dtype == "auto":
        on_gpu = not own.startswith("cpu")
        dtype = bundle.dtype if bundle and on_gpu else opened(name).dtypes()[0]
    return Candidate(name, dtype, own)


def _asked_for(backend: str, device: str) -> tuple[str, str]:
    module = opened(backend)
    if reason := module.available():
        raise EngineError(reason)
    if device == "auto":
        here = [one for one in module.devices() if one.startswith(("cpu", "cuda:"))]
        return backend, next((one for one in here if one != "cpu"), here[0] if here else "cuda:0")
    if not module.on_gpu and device not in module.devices():  # those for GPUs say themselves what is wrong
        raise EngineError(f"backend {backend}: got device {device}, expected one of {', '.join(module.devices())}")
    return backend, device


def _first(dtype: str, device: str, build: bool) -> tuple[str, str]:
    """The first backend that can be used, and its device; one that computes in `dtype` where there is such."""
    missing, found = [], None
    for name, its_device in _in_order(device):
        try:
            own = _device(name, its_device, build)
        except EngineError as e:
            missing.append(str(e))
            continue
        if dtype in ("auto", *opened(name).dtypes()):
            return name, own
        found = found or (name, own)
    if not found:
        raise EngineError(f"no engine can be used on {'this machine' if device == 'auto' else device}: "
                          + "; ".join(missing))
    return found


def _in_order(device: str) -> Iterator[tuple[str, str]]:
    """(backend, device) by preference; nothing is asked of a backend for GPUs on a machine without one."""
    for kind, names in PREFERENCE.items():
        if device == "auto" and (kind == "cpu" or gpus()):
            yield from ((name, "cpu" if kind == "cpu" else "cuda:0") for name in names if name in BACKENDS)
        elif device != "auto" and (kind == "cpu") == device.startswith("cpu"):
            yield from ((name, device) for name in names if name in BACKENDS)


def _device(name: str, device: str, build: bool) -> str:
    """`device`. Raises EngineError where backend `name` cannot use it."""
    module = opened(name)
    if reason := module.available():
        raise EngineError(reason)
    known = module.devices()
    if device not in known and not ("cuda:0" in known and device in {gpu.arch for gpu in gpus()}):
        raise EngineError(f"backend {name}: got device {device}, expected one of {', '.join(known)}")
    if not build and (reason := module.runnable(EngineConfig(name, device=device))):
        raise EngineError(f"backend {name}: {reason}")
    return device


def _matches(one: Candidate, backend: str, dtype: str, device: str) -> bool:
    return all(asked in ("auto", own) for asked, own in zip((backend, dtype, device), one, strict=True))


def _is_usable(one: Candidate, build: bool) -> bool:
    try:
        return bool(_device(one.backend, one.device, build))
    except EngineError:
        return False


def _measured(bundle: Bundle, size: tuple[int, int] | None, batch: int, threads: int) -> dict[Candidate, float]:
    """Return the seconds of a step of every engine that was measured here and would be used, the fastest first.

    A step is a call of the denoiser, whole or without what can be computed before, for both branches of guidance.
    """
    size = size or bundle.manifest.default_size
    steps = {name: c for name, c in bundle.graphs(bundle.denoiser).items() if c.part in ("", "body") and not c.variant}
    here, times = compare.machines(), {}
    for path in engine_directories(bundle):
        record = _record(path) if path.name.startswith(tuple(f"{name}-" for name in steps)) else None
        if record is None or record.timing is None:
            continue
        if record.component not in steps or record.timing.machine not in here:
            continue
        config = record.config
        wanted = bundle.config(record.component, backend=config.backend, dtype=config.dtype, device=config.device,
                               threads=threads, size=size, batch=steps[record.component].row_counts(batch)[-1])
        if config == wanted and _fresh(bundle, record):
            times[Candidate(config.backend, config.dtype, config.device)] = record.timing.seconds
    return dict(sorted(times.items(), key=lambda item: item[1]))


def _record(path: Path) -> Record | None:
    try:
        return Record.read(path, "")
    except EngineError:
        return None  # whoever loads it is told


def _fresh(bundle: Bundle, record: Record) -> bool:
    try:
        return stale(bundle, record) is None
    except EngineError:  # its backend is not installed
        return False


def _why(chosen: Candidate, times: dict[Candidate, float], otherwise: str) -> str:
    others = ", ".join(f"{one} {duration(seconds)}" for one, seconds in times.items() if one != chosen)
    if chosen not in times:
        return otherwise + (f"; not measured here yet, unlike {others}" if others else "")
    return f"{duration(times[chosen])} a step, " + (
        f"the fastest measured here ({others})" if others else "the only one measured here")
