"""Which backend and device `auto` means on this machine, and in which precision."""

from __future__ import annotations

import logging

import engines
from engines.gpu import gpus
from engines.spec import DTYPES, EngineConfig, EngineError

PREFERENCE = ("openvino", "onnxruntime")  # fastest first, as `python -m benchmarks unet` measures them
ON_GPU = ("tensorrt", "tensorrt-rtx")  # the same for a GPU
log = logging.getLogger(__name__)


def choose(backend: str = "auto", dtype: str = "auto", device: str = "auto") -> tuple[str, str]:
    """(backend, dtype) with "auto" filled in: the fastest backend installed, and the precision it runs best here.

    device: "cpu", or "cuda:N" for a backend of that GPU; "auto" prefers a GPU where there is one and a backend for it.
    Raises EngineError for names that are not known, and where no backend can be used.
    """
    if backend == "auto":
        missing = {name: engines.backend(name).available() for name in PREFERENCE}
        found = [*_on_gpu(device), *(name for name in missing if missing[name] is None and _is_cpu(device))]
        if not found and not _is_cpu(device):
            raise EngineError(f"device: got {device}, expected one that an installed backend runs on; "
                              "see: python -m engines list")
        if not found:
            raise EngineError("no engine is installed: " + "; ".join(str(reason) for reason in missing.values()))
        backend = found[0]
    elif reason := engines.backend(backend).available():
        raise EngineError(reason)
    if dtype == "auto":
        dtype = engines.backend(backend).dtypes()[0]
    if dtype not in DTYPES:
        raise EngineError(f"dtype: got {dtype!r}, expected auto or one of {', '.join(DTYPES)}")
    log.info("backend %s, computing in %s", backend, dtype)
    return backend, dtype


def device_of(backend: str, device: str = "auto") -> str:
    """`device` as engines are configured with it; "auto" is the first GPU that the backend can use here, or the CPU.

    Raises EngineError where there is neither.
    """
    if device != "auto":
        return "cuda:0" if device == "cuda" else device
    here = [name for name in engines.backend(backend).devices() if name.startswith(("cpu", "cuda:"))]
    if not here:
        raise EngineError(f"device: got none that {backend} runs on, expected an NVIDIA GPU in this machine; "
                          "use a backend of the CPU, such as onnxruntime")
    return next((name for name in here if name != "cpu"), here[0])


def _is_cpu(device: str) -> bool:
    return device == "auto" or device.startswith("cpu")


def _on_gpu(device: str) -> list[str]:
    """The backends that can run on `device`, for "auto" on the first GPU of this machine."""
    if device.startswith("cpu") or not gpus():
        return []
    return [name for name in ON_GPU if _runs(name, "cuda:0" if device == "auto" else device_of(name, device))]


def _runs(name: str, device: str) -> bool:
    module = engines.backend(name)
    try:
        return module.available() is None and device in module.devices() and bool(
            module.versions(EngineConfig(backend=name, device=device)))
    except EngineError:  # an architecture that it does not know
        return False
