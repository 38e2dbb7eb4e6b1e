"""Export: a checkpoint becomes a bundle (ONNX graphs, tokenizer, manifest).

Importing this package is cheap: torch, diffusers and transformers are imported when `export` is called.
"""

from __future__ import annotations

import datetime
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from engines.bundle import MANIFEST, Bundle, hash_file, hash_files, write_manifest
from engines.bundle.publish import publish
from engines.spec import DTYPES
from export.errors import ExportError
from export.families.manifest import TOKENIZERS, manifest

if TYPE_CHECKING:
    from export.sources.addition import Addition
    from export.sources.checkpoint import Checkpoint


def export(checkpoint: str | Path, output: str | Path, *, dtype: str = "auto", force: bool = False,
           progress: bool = True, config: str | Path | None = None, tokenizer: str | Path | None = None) -> Bundle:
    """Trace a checkpoint to ONNX, compare every graph with PyTorch, and publish the bundle at `output`.

    checkpoint: a diffusers folder, or one .safetensors / .ckpt file in the original Stable Diffusion 1.x or 2.x layout.
    dtype: precision of weights and arithmetic, "fp32" (also "auto"), "fp16" or "bf16"; inputs and outputs are float32.
    The VAE of Stable Diffusion XL, which overflows fp16, is then bf16.
    force: replace what is at `output`. progress: draw a bar if stderr is a terminal. config, for a single file: one of
    FAMILIES, or a diffusers folder whose configuration (not weights) is used. tokenizer: a folder to use instead of the
    checkpoint's. Nothing is downloaded. Raises ExportError or engines.EngineError; what was at `output` is then still
    there.
    """
    if dtype not in ("auto", *DTYPES):
        raise ExportError(f"dtype: got {dtype!r}, expected auto, {', '.join(DTYPES)}")
    dtype = "fp32" if dtype == "auto" else dtype
    with publish(Path(output), force, marker=MANIFEST) as directory:
        from export.families.stable_diffusion import graphs
        from export.sources.checkpoint import open_checkpoint
        from export.sources.tokenizer import save_tokenizer
        from export.trace.component import STAGES, export_component, precision

        source = open_checkpoint(Path(checkpoint), config, tokenizer)
        names, hidden = tuple(graphs(source)), None if progress else True  # None: unless stderr is a terminal
        with tqdm(total=len(STAGES) * len(names), disable=hidden, leave=False, unit="stage") as stages:
            def on_stage(name: str) -> None:
                stages.set_description(name)
                stages.update()

            components: dict[str, Any] = {}
            for name in names:
                components |= export_component(name, source, precision(name, source, dtype), directory, on_stage)
        for text in source.texts:
            save_tokenizer(text.tokenizer, directory / TOKENIZERS[text.name])
        tokenizers = hash_files(directory, [TOKENIZERS[text.name] for text in source.texts])
        write_manifest(directory, manifest(source, components, tokenizers, provenance(source)))
    return Bundle.open(output)


def provenance(source: Checkpoint | Addition) -> dict[str, Any]:
    """What a component was made of, with what and when."""
    try:
        version = importlib.metadata.version("latentrt")
    except importlib.metadata.PackageNotFoundError:
        version = "(from a checkout)"
    packages = ("torch", "onnx", "onnxscript", "diffusers", "transformers")
    return {
        "source": source.name,
        "sha256": {str(file.relative_to(source.root)): hash_file(file) for file in source.weights},
        "exporter": f"latentrt {version}",
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
