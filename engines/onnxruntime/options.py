"""The package of ONNX Runtime, and which of its providers a config means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines.machine.vendor import importing
from engines.spec import EngineConfig, EngineError

PIP = "pip install onnxruntime"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
"""Value of the option `provider` → ONNX Runtime's name of it."""


def vendor() -> Any:
    """Return the package. Raises EngineError with the pip line where it is missing."""
    with importing("onnxruntime", PIP):
        import onnxruntime
    return onnxruntime


def provider(config: EngineConfig, cache: Path | None = None) -> tuple[str, dict[str, str]]:
    """Return the provider that a config means, and its settings. cache: directory of the engines that it builds.

    Raises EngineError for a device or an option that ONNX Runtime, or this build of it, does not have.
    """
    if unknown := set(config.options) - {"provider"}:
        raise EngineError(f"onnxruntime: got unknown options {sorted(unknown)}, expected only 'provider'")
    device, _, number = config.device.partition(":")
    if device not in ("cpu", "cuda") or (device == "cpu" and number) or (number and not number.isdigit()):
        raise EngineError(f"onnxruntime: got device {config.device!r}, expected cpu, cuda or cuda:N")
    name = config.options.get("provider", device)
    if name not in PROVIDERS or (name == "cpu") != (device == "cpu"):
        raise EngineError(f"onnxruntime on {config.device}: got provider {name!r}, expected "
                          f"{'cpu' if device == 'cpu' else 'cuda or tensorrt'}")
    if PROVIDERS[name] not in vendor().get_available_providers():
        raise EngineError(f"onnxruntime: this build has no {PROVIDERS[name]}; run: pip install onnxruntime-gpu")
    if name == "cpu":
        return PROVIDERS[name], {}
    options = {"device_id": number or "0"}
    if name == "cuda":
        options["use_tf32"] = "0" if config.dtype == "fp32" else "1"
    elif cache is not None:
        options |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache)}
    return PROVIDERS[name], options
