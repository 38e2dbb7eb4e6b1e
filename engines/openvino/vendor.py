"""The package openvino, imported when it is needed."""

from __future__ import annotations

from typing import Any

from engines.machine.vendor import importing

PIP = "pip install openvino"


def package() -> Any:
    """Return the package openvino. Raises EngineError with the pip line where it is missing."""
    with importing("openvino", PIP):
        import openvino
    return openvino
