"""Reading an ONNX file to work on its graph, with onnx_ir. Opening and running an engine do without it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.spec import EngineError

if TYPE_CHECKING:
    import onnx_ir as ir

PIP = "pip install onnx-ir"


def library(purpose: str) -> Any:
    """Return the package onnx_ir. Raises EngineError where it is missing, which says that `purpose` needs it."""
    try:
        import onnx_ir as ir
    except ImportError as e:
        raise EngineError(f"{purpose} needs onnx_ir, which is missing; run: {PIP}") from e
    return ir


def read(path: Path, purpose: str) -> ir.Model:
    """Return the model of an ONNX file; weights in other files stay there, mapped.

    purpose: as of `library`, such as "checking new weights". Raises EngineError for a file that is none, or without
    onnx_ir.
    """
    ir = library(purpose)
    try:
        return ir.load(path)
    except Exception as e:  # of protobuf, numpy and the file system
        raise EngineError(f"{path}: not a readable ONNX file ({e}); export the bundle again") from e
