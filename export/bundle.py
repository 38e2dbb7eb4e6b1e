"""A checkpoint becomes a bundle."""

from __future__ import annotations

import datetime
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.bundle import MANIFEST, Bundle, hash_file, hash_files, write_manifest
from engines.bundle.publish import publish
from engines.spec import DTYPES
from export.errors import ExportError

if TYPE_CHECKING:
    from export.families.family import Model


def export(checkpoint: str | Path, output: str | Path, *, dtype: str = "auto", force: bool = False,
           progress: bool = True, config: str | Path | None = None, tokenizer: str | Path | None = None) -> Bundle:
    """Trace a checkpoint to ONNX, compare every graph with PyTorch, and publish the bundle at `output`.

    checkpoint: a diffusers folder, or one .safetensors / .ckpt file in the original Stable Diffusion 1.x or 2.x layout.
    dtype: precision of weights and arithmetic, "fp32" (also "auto"), "fp16" or "bf16"; inputs and outputs are float32.
    A VAE that overflows fp16, as that of Stable Diffusion XL does, is then bf16. force: replace what is at `output`.
    progress: draw a bar if stderr is a terminal. config, for a single file: one of ARCHITECTURES, or a diffusers folder
    whose configuration (not weights) is used. tokenizer: a folder to use instead of the checkpoint's. Nothing is
    downloaded. Raises ExportError or engines.EngineError; what was at `output` is then still there.
    """
    if dtype not in ("auto", *DTYPES):
        raise ExportError(f"dtype: got {dtype!r}, expected auto, {', '.join(DTYPES)}")
    dtype = "fp32" if dtype == "auto" else dtype
    with publish(Path(output), force, marker=MANIFEST) as directory:
        from export.families import open_model
        from export.sources.open import open_checkpoint
        from export.sources.tokenizer import save_tokenizer
        from export.trace.component import export_components

        model = open_model(open_checkpoint(Path(checkpoint), config, tokenizer))
        components = export_components(model, dtype, directory, progress)
        for file, words in model.tokenizers.items():
            save_tokenizer(words, directory / file)
        files = hash_files(directory, model.tokenizers)
        write_manifest(directory, model.manifest(components, files, provenance(model)))
    return Bundle.open(output)


def provenance(model: Model) -> dict[str, Any]:
    """Say what components were made of, with what and when."""
    try:
        version = importlib.metadata.version("latentrt")
    except importlib.metadata.PackageNotFoundError:
        version = "(from a checkout)"
    packages = ("torch", "onnx", "onnxscript", "diffusers", "transformers")
    return {
        "source": model.name,
        "sha256": {str(file.relative_to(model.root)): hash_file(file) for file in model.weights},
        "exporter": f"latentrt {version}",
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
