"""One of the checkpoint's modules: load it, trace it, save it, and compare the saved graph with PyTorch."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import onnx_ir as ir
import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from engines.backend import Target
from engines.bundle import Check, Component, hash_files, resolve_dims
from engines.check import compare
from engines.spec import EngineConfig, EngineError
from export.errors import ExportError
from export.families import manifest as family
from export.families.stable_diffusion import Graph, graphs
from export.families.variants import variants
from export.passes.hoist import Part, hoist
from export.sources.addition import Addition
from export.sources.checkpoint import Checkpoint
from export.trace.trace import trace

logger = logging.getLogger(__name__)

STAGES = ("load", "trace", "save", "check")
"""Of each component."""

REFERENCE = "PyTorch eager, float32"

SEED = 1234
"""Of the inputs that a graph is checked with."""

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def precision(name: str, checkpoint: Checkpoint | Addition, dtype: str) -> str:
    """What component `name` has in a bundle of `dtype`: bf16 instead of fp16 for a VAE that overflows that."""
    return "bf16" if dtype == "fp16" and name.startswith("vae") and checkpoint.vae_overflows else dtype


def export_component(name: str, checkpoint: Checkpoint | Addition, dtype: str, directory: Path,
                     on_stage: Callable[[str], None] = lambda stage: None) -> dict[str, Component]:
    """Write `directory`/`name`.onnx and `name`.onnx.data, and check them; `on_stage` hears of each of STAGES.

    Returns the component by its name, and the parts of `export.passes.hoist` by theirs; of a UNet also the
    `export.families.variants`. Only one component's weights are in memory at a time, and PyTorch's are gone before onnxruntime
    reads the file.
    Raises ExportError where the graph is further from PyTorch than `engines.check.tolerance.TOLERANCE`.
    """
    on_stage(f"{name}: load")
    graph = _load(name, checkpoint)
    dims = _dims(checkpoint, check=True)
    inputs = graph.example(dims, SEED)
    others = variants(graph.model) if name == "unet" else ()
    given = {spec.name: spec.resolve(dims) for other in others for spec in other.inputs}
    added = compare.inputs(given.values(), SEED)
    expected = {"": _run(graph, inputs)}
    for other in others:
        with other.eager(graph.model, {n: torch.from_numpy(value) for n, value in added.items()}) as more:
            outputs = _run(graph, inputs)
        expected[other.key] = outputs | {n: value.detach().numpy() for n, value in more.items()}

    on_stage(f"{name}: trace")
    graph.to(_DTYPES[dtype])
    model, sites = trace(graph, _dims(checkpoint, check=False))

    on_stage(f"{name}: save")
    file = directory / f"{name}.onnx"
    ir.save(model, file, external_data=f"{name}.onnx.data")
    specs, invariant, shapes = (graph.inputs, graph.outputs), graph.invariant, graph.shapes
    for value in model.graph.initializers.values():
        value.const_value = None  # onnxscript's rewrite rules remember the last graph that they have seen
    del graph, model
    cut = hoist(file, invariant, *specs, shapes) if invariant else {}
    graphs = {("", ""): Part(*specs, sites), **{(part, ""): graph for part, graph in cut.items()}}
    parts = [family.component_name(name, part) for part in cut]
    for other in others:
        for part in ("", *list(cut)[-1:]):
            base, target = (directory / f"{family.component_name(name, part, key)}.onnx"
                            for key in (other.base, other.key))
            plain, sites = graphs[part, ""], other.write(base, target)
            graphs[part, other.key] = Part((*plain.inputs, *other.inputs), (*plain.outputs, *other.outputs), sites)
    made = {family.component_name(name, *place): {**family.place(name, *place), **graph._asdict()}
            for place, graph in graphs.items()}

    on_stage(f"{name}: check")
    feed = {spec.name: value.numpy() for spec, value in zip(specs[0], inputs, strict=True)} | added
    weights = hash_files(directory, [f"{file.name}.data"])

    def checked(names: Sequence[str], expected: dict[str, np.ndarray], reference: str) -> dict[str, Component]:
        unchecked = Check("not checked", SEED, 0.0, 0.0)
        found = {n: Component(file=f"{n}.onnx", files=hash_files(directory, [f"{n}.onnx"]) | weights, dtype=dtype,
                              check=unchecked, **made[n]) for n in names}
        check = _check(list(found.values()), directory, dims, feed, expected, reference)
        logger.info("%s: %s, relative RMS %.1e", ", ".join(names), dtype, check.rel_rms)
        return {n: dataclasses.replace(component, check=check) for n, component in found.items()}

    components: dict[str, Component] = {}
    for key, outputs in expected.items():
        whole = family.component_name(name, variant=key)
        components |= checked([whole], outputs, REFERENCE)
        if parts:
            body = family.component_name(name, "body", key)
            found = checked([*parts[:-1], body], outputs, f"{REFERENCE}, the parts together")
            components |= {n: component for n, component in found.items() if n not in components}
    return components


def _run(graph: Graph, inputs: Sequence[torch.Tensor]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return {spec.name: value.numpy() for spec, value in zip(graph.outputs, graph.run(inputs), strict=True)}


def _load(name: str, checkpoint: Checkpoint | Addition) -> Graph:
    graph = (checkpoint.graphs if isinstance(checkpoint, Addition) else graphs(checkpoint))[name]
    with _no_progress_bars():
        return graph(checkpoint.load(graph.source), cast(Checkpoint, checkpoint)).eval()


def _dims(checkpoint: Checkpoint | Addition, check: bool) -> dict[str, int]:
    """Sizes to trace at and, different in every one, to check at: what was fixed by mistake shows."""
    unit, factor, length = checkpoint.multiple, checkpoint.factor, checkpoint.max_length
    batch, height, width, sequence = (3, unit, 2 * unit, length) if check else (2, 3 * unit, 4 * unit, 2 * length)
    given = {"batch": batch, "height": height * factor, "width": width * factor, "sequence": sequence}
    follow = family.dims(factor, unit)
    return resolve_dims([*given, *follow], given, follow)


def _check(parts: Sequence[Component], directory: Path, dims: Mapping[str, int], feed: dict[str, np.ndarray],
           expected: dict[str, np.ndarray], reference: str) -> Check:
    """Run saved graphs, one after another, in onnxruntime on the CPU, widened to float32 if they are of 16 bits.

    What is then measured is the graph and the rounding of its weights: the CPU has no kernels for most 16-bit
    operators, and how an engine rounds in between is measured when it is built.
    """
    arrays = dict(feed)
    try:
        for part in parts:
            given = {spec.name: arrays[spec.name] for spec in part.inputs}
            arrays |= compare.run_reference(
                Target(directory, part.file, part, EngineConfig("onnxruntime", dims)), given)
        what = f"{', '.join(part.file for part in parts)} in {parts[0].dtype}"
        return compare.arrays(arrays, expected, parts[0].dtype, what, SEED, reference)
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
