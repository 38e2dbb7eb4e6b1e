"""The bundle: a directory of ONNX graphs whose only index is `manifest.json`. Nothing here knows any model."""

from engines.bundle.manifest import (
    CONTROL,
    FIRST,
    FORMAT,
    HIDDEN,
    MANIFEST,
    PARTS,
    PREVIOUS,
    RESIDUAL,
    STORE,
    TASKS,
    Bundle,
    Check,
    Component,
    DimSpec,
    ExtraChannels,
    LatentSpec,
    Manifest,
    TextSpec,
    hash_file,
    hash_files,
    resolve_dims,
    write_manifest,
)

__all__ = ["CONTROL", "FIRST", "FORMAT", "HIDDEN", "MANIFEST", "PARTS", "PREVIOUS", "RESIDUAL", "STORE", "TASKS", "Bundle",
           "Check", "Component", "DimSpec", "ExtraChannels", "LatentSpec", "Manifest", "TextSpec", "hash_file", "hash_files", "resolve_dims",
           "write_manifest"]
