"""The bundle: a directory of ONNX graphs whose only index is `manifest.json`. Nothing here knows any model."""

from engines.bundle.bundle import Bundle
from engines.bundle.dims import DimSpec, resolve_dims
from engines.bundle.files import hash_file, hash_files
from engines.bundle.manifest import (
    FORMAT,
    MANIFEST,
    Check,
    Component,
    Condition,
    Guidance,
    LatentSpec,
    Manifest,
    TextSpec,
    write_manifest,
)

__all__ = ["FORMAT", "MANIFEST", "Bundle", "Check", "Component", "Condition", "DimSpec", "Guidance", "LatentSpec",
           "Manifest", "TextSpec", "hash_file", "hash_files", "resolve_dims", "write_manifest"]
