"""One of the checkpoint's modules: load it, trace it, save it, and compare the saved graph with PyTorch."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from engines import verify
from engines.bundle import Check, Component, hash_files
from engines.spec import EngineConfig, EngineError
from export import ExportError
from export.checkpoint import Checkpoint
from export.graphs import Graph, graphs
from export.hoist import Part, hoist
from export.trace import trace

logger = logging.getLogger(__name__)

STAGES = ("load", "trace", "save", "check")
"""Of each component."""

REFERENCE = "PyTorch eager, float32"

SEED = 1234
"""Of the inputs that a graph is checked with."""

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def precision(name: str, checkpoint: Checkpoint, dtype: str) -> str:
    """What component `name` has in a bundle of `dtype`: bf16 instead of fp16 for a VAE that overflows that."""
    return "bf16" if dtype == "fp16" and name.startswith("vae") and checkpoint.vae_overflows else dtype


def export_component(name: str, checkpoint: Checkpoint, dtype: str, directory: Path,
                     on_stage: Callable[[str], None] = lambda stage: None) -> dict[str, Component]:
    """Write `directory`/`name`.onnx and `name`.onnx.data, and check them; `on_stage` hears of each of STAGES.

    Returns the component by its name, and the parts of `export.hoist` by theirs. Only one component's weights are in
    memory at a time, and PyTorch's are gone before onnxruntime reads the file.
    Raises ExportError where the graph is further from PyTorch than `engines.verify.TOLERANCE`.
    """
    on_stage(f"{name}: load")
    graph = _load(name, checkpoint)
    inputs = graph.example(_dims(checkpoint, check=True), SEED)
    with torch.no_grad():
        outputs = graph.run(inputs)
    expected = {spec.name: value.numpy() for spec, value in zip(graph.outputs, outputs, strict=True)}

    on_stage(f"{name}: trace")
    graph.to(_DTYPES[dtype])
    model, sites = trace(graph, _dims(checkpoint, check=False))

    on_stage(f"{name}: save")
    file = directory / f"{name}.onnx"
    ir.save(model, file, external_data=f"{name}.onnx.data")
    specs, invariant = (graph.inputs, graph.outputs), graph.invariant
    for value in model.graph.initializers.values():
        value.const_value = None  # onnxscript's rewrite rules remember the last graph that they have seen
    del graph, model, outputs
    parts = hoist(file, invariant, *specs) if invariant else {}

    on_stage(f"{name}: check")
    feed = {spec.name: value.numpy() for spec, value in zip(specs[0], inputs, strict=True)}
    weights = hash_files(directory, [f"{file.name}.data"])

    def component(name: str, part: Part) -> Component:
        return Component(f"{name}.onnx", hash_files(directory, [f"{name}.onnx"]) | weights, dtype, *part,
                         Check("not checked", SEED, 0.0, 0.0))

    whole = component(name, Part(*specs, sites))
    check = _check([whole], directory, feed, expected, REFERENCE)
    logger.info("%s: %s, sites %s, relative RMS %.1e", name, dtype, sites, check.rel_rms)
    components = {name: dataclasses.replace(whole, check=check)}
    if parts:
        made = {f"{name}_{part}": component(f"{name}_{part}", found) for part, found in parts.items()}
        check = _check(list(made.values()), directory, feed, expected, f"{REFERENCE}, the parts together")
        components |= {part: dataclasses.replace(found, check=check) for part, found in made.items()}
    return components


def _load(name: str, checkpoint: Checkpoint) -> Graph:
    graph = graphs(checkpoint)[name]
    with _no_progress_bars():
        return graph(checkpoint.load(graph.source), checkpoint).eval()


def _dims(checkpoint: Checkpoint, check: bool) -> dict[str, int]:
    """Sizes to trace at and, different in every one, to check at: what was fixed by mistake shows."""
    unit, factor, length = checkpoint.multiple, checkpoint.factor, checkpoint.max_length
    batch, height, width, sequence = (3, unit, 2 * unit, length) if check else (2, 3 * unit, 4 * unit, 2 * length)
    return {"batch": batch, "latent_height": height, "latent_width": width, "height": height * factor,
            "width": width * factor, "sequence": sequence}


def _check(parts: Sequence[Component], directory: Path, feed: dict[str, np.ndarray], expected: dict[str, np.ndarray],
           reference: str) -> Check:
    """Run saved graphs, one after another, in onnxruntime on the CPU, widened to float32 if they are of 16 bits.

    What is then measured is the graph and the rounding of its weights: the CPU has no kernels for most 16-bit
    operators, and how an engine rounds in between is measured when it is built.
    """
    arrays = dict(feed)
    try:
        for part in parts:
            sizes = {dim: size for spec in part.inputs
                     for dim, size in zip(spec.shape, arrays[spec.name].shape, strict=True) if isinstance(dim, str)}
            sizes |= {dim: size for spec in part.outputs if spec.name in expected
                      for dim, size in zip(spec.shape, expected[spec.name].shape, strict=True) if isinstance(dim, str)}
            given = {spec.name: arrays[spec.name] for spec in part.inputs}
            arrays |= verify.run_reference(directory / part.file, part, EngineConfig("onnxruntime", **sizes), given)
        what = f"{', '.join(part.file for part in parts)} in {parts[0].dtype}"
        return verify.compare(arrays, expected, parts[0].dtype, what, SEED, reference)
    except EngineError as e:
        raise ExportError(f"{e}; nothing was published") from e


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """The libraries draw their own bars under ours; both settings are global, so they are put back."""
    enabled = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in enabled:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in enabled:
            log.enable_progress_bar()
