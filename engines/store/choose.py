"""The meaning of `auto`: which backend, device and precision it is on this machine, and why."""

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
    """The backend, precision and device that "auto" has become. why: the reason, in words."""

    backend: str
    dtype: str
    device: str
    why: str


class Candidate(NamedTuple):
    """A backend, precision and device that could be chosen."""

    backend: str
    dtype: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend} {self.dtype}"


def choose(backend: str = "auto", dtype: str = "auto", device: str = "auto", *, bundle: Bundle | None = None,
           size: tuple[int, int] | None = None, batch: int = 1, threads: int = 0, build: bool = False) -> Choice:
    """Fill in "auto": the backend, device and precision that are preferred here, unless another measured faster.

    Preferred is the first of PREFERENCE that is installed and whose device this machine has, in the precision that it
    prefers there, which on a GPU is that of the graph. `auto` overrules the preferred engine only where that engine has
    been measured too: by engines of the bundle's denoiser for `batch` pictures of `size` (height, width; the model's
    own by default) with guidance, measured on this machine. build: the engine need not run here, so `device` may be the
    architecture of a GPU that is elsewhere.

    Raises EngineError for names that are not known, and where no backend can be used.
    """
    if dtype not in ("auto", *DTYPES):
        raise EngineError(f"dtype: got {dtype!r}, expected auto or one of {', '.join(DTYPES)}")
    device = "cuda:0" if device == "cuda" else device
    preferred = _preferred(backend, dtype, device, bundle, build)
    times = _measured(bundle, size, batch, threads) if bundle else {}
    times = {candidate: seconds for candidate, seconds in times.items()
             if _matches(candidate, Candidate(backend, dtype, device))}
    chosen = preferred
    if preferred in times:  # the others are looked at from the fastest on, and no further than need be
        chosen = next(candidate for candidate in times if candidate == preferred or _is_usable(candidate, build))
    why = _why(chosen, times, "asked for" if backend != "auto" else "preferred of what can be used here")
    if "auto" in (backend, dtype):
        logger.info("backend %s, computing in %s on %s: %s", *chosen, why)
    return Choice(*chosen, why)


def _preferred(backend: str, dtype: str, device: str, bundle: Bundle | None, build: bool) -> Candidate:
    name, device = _asked_for(backend, device) if backend != "auto" else _first(dtype, device, build)
    if dtype == "auto":
        dtype = bundle.dtype if bundle and not device.startswith("cpu") else opened(name).dtypes()[0]
    return Candidate(name, dtype, device)


def _asked_for(backend: str, device: str) -> tuple[str, str]:
    module = opened(backend)
    if reason := module.available():
        raise EngineError(reason)
    if device == "auto":
        here = [known for known in module.devices() if known.startswith(("cpu", "cuda:"))]
        return backend, next((known for known in here if known != "cpu"), here[0] if here else "cuda:0")
    if not module.on_gpu and device not in module.devices():  # those for GPUs say themselves what is wrong
        raise EngineError(f"backend {backend}: got device {device}, expected one of {', '.join(module.devices())}")
    return backend, device


def _first(dtype: str, device: str, build: bool) -> tuple[str, str]:
    """Return the first backend that can be used, and its device; one that computes in `dtype` where there is such."""
    missing, fallback = [], None
    for name, place in _in_order(device):
        try:
            _check(name, place, build)
        except EngineError as e:
            missing.append(str(e))
            continue
        if dtype in ("auto", *opened(name).dtypes()):
            return name, place
        fallback = fallback or (name, place)
    if not fallback:
        raise EngineError(f"no engine can be used on {'this machine' if device == 'auto' else device}: "
                          + "; ".join(missing))
    return fallback


def _in_order(device: str) -> Iterator[tuple[str, str]]:
    """Yield (backend, device) by preference; no backend for GPUs is asked anything on a machine without one."""
    for kind, names in PREFERENCE.items():
        if device == "auto" and (kind == "cpu" or gpus()):
            yield from ((name, "cpu" if kind == "cpu" else "cuda:0") for name in names if name in BACKENDS)
        elif device != "auto" and (kind == "cpu") == device.startswith("cpu"):
            yield from ((name, device) for name in names if name in BACKENDS)


def _check(name: str, device: str, build: bool) -> None:
    """Raise EngineError where backend `name` cannot use a device."""
    module = opened(name)
    if reason := module.available():
        raise EngineError(reason)
    known = module.devices()
    if device not in known and not ("cuda:0" in known and device in {gpu.arch for gpu in gpus()}):
        raise EngineError(f"backend {name}: got device {device}, expected one of {', '.join(known)}")
    if not build and (reason := module.runnable(EngineConfig(name, device=device))):
        raise EngineError(f"backend {name}: {reason}")


def _matches(candidate: Candidate, asked: Candidate) -> bool:
    return all(word in ("auto", value) for word, value in zip(asked, candidate, strict=True))


def _is_usable(candidate: Candidate, build: bool) -> bool:
    try:
        _check(candidate.backend, candidate.device, build)
    except EngineError:
        return False
    return True


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
        if config == wanted and _is_fresh(bundle, record):
            times[Candidate(config.backend, config.dtype, config.device)] = record.timing.seconds
    return dict(sorted(times.items(), key=lambda item: item[1]))


def _record(path: Path) -> Record | None:
    try:
        return Record.read(path, "")
    except EngineError:
        return None  # whoever loads it is told


def _is_fresh(bundle: Bundle, record: Record) -> bool:
    try:
        return stale(bundle, record) is None
    except EngineError:  # its backend is not installed
        return False


def _why(chosen: Candidate, times: dict[Candidate, float], otherwise: str) -> str:
    others = ", ".join(f"{candidate} {duration(seconds)}" for candidate, seconds in times.items()
                       if candidate != chosen)
    if chosen not in times:
        return otherwise + (f"; not measured here yet, unlike {others}" if others else "")
    return f"{duration(times[chosen])} a step, " + (
        f"the fastest measured here ({others})" if others else "the only one measured here")
