"""Export: a checkpoint becomes a bundle (ONNX graphs, tokenizer, manifest).

`export.attach` has what adds to a bundle, `export.trace.module` what traces any other module. Importing this package is
cheap: torch, diffusers and transformers are imported when a checkpoint is read.
"""

from export.bundle import export
from export.errors import ExportError
from export.sources.architectures import ARCHITECTURES

__all__ = ["ARCHITECTURES", "ExportError", "export"]
