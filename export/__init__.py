"""Export: a checkpoint becomes a bundle (ONNX graphs, tokenizer, manifest).

Importing this package is cheap: torch, diffusers and transformers are imported when `export` is called.
"""

from export.bundle import export
from export.errors import FAMILIES, ExportError

__all__ = ["FAMILIES", "ExportError", "export"]
