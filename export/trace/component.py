"""One of a model's modules as components of a bundle: loaded, traced, saved, and compared with PyTorch."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from diffusers.utils import logging as diffusers_logging
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from engines.backend import Target
from engines.bundle import Check, Component, hash_files
from engines.check import verify
from engines.spec import EngineConfig, EngineError, TensorSpec
from export.errors import ExportError
from export.families.family import Model
from export.passes.hoist import hoist
from export.trace.sites import check_sites, count_sites
from export.trace.trace import trace
from export.trace.traced_module import Extension, TracedModule

logger = logging.getLogger(__name__)

STAGES = ("load", "trace", "save", "check")
"""Stages of the export of one module."""

REFERENCE = "PyTorch eager, float32"

SEED = 1234
"""Seed of the inputs that a graph is checked with."""

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Arrays = Mapping[str, np.ndarray]


class Saved(NamedTuple):
    """A graph that was saved: what goes in and comes out, and its kernel sites (op type → count)."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sites: dict[str, int]


class Truth(NamedTuple):
    """What a graph is compared with. feed: inputs by name. expected: variant ("" for the plain graph) → outputs."""

    feed: dict[str, np.ndarray]
    expected: dict[str, dict[str, np.ndarray]]


def export_components(model: Model, dtype: str, directory: Path, progress: bool = True) -> dict[str, Component]:
    """Write all of a model's components into `directory`, and check them; returns them by name.

    dtype: of the bundle. progress: draw a bar if stderr is a terminal. Raises ExportError.
    """
    names = tuple(model.modules)
    with tqdm(total=len(STAGES) * len(names), disable=None if progress else True, leave=False, unit="stage") as stages:
        def on_stage(name: str) -> None:
            stages.set_description(name)
            stages.update()

        components: dict[str, Component] = {}
        for name in names:
            components |= export_component(name, model, model.precision(name, dtype), directory, on_stage)
    return components


def export_component(name: str, model: Model, dtype: str, directory: Path,
                     on_stage: Callable[[str], None] = lambda stage: None) -> dict[str, Component]:
    """Write `directory`/`name`.onnx and `name`.onnx.data, and check them; `on_stage` hears of each of STAGES.

    Returns the component by its name, and by theirs the parts of `export.passes.hoist` and the module's extensions.
    Only one module's weights are in memory at a time, and PyTorch's are gone before onnxruntime reads the file. Raises
    ExportError where a graph is further from PyTorch than `engines.check.verify.TOLERANCE`.
    """
    on_stage(f"{name}: load")
    with _no_progress_bars():
        module = model.modules[name]().eval()
    extensions, dims = module.extensions, model.sizes(check=True)
    truth = _truth(module, extensions, dims)
    on_stage(f"{name}: trace")
    traced = trace(module.to(_DTYPES[dtype]), module.example(model.sizes(check=False), seed=0))
    check_sites(traced.graph, module)
    on_stage(f"{name}: save")
    graphs, parts = _write(traced, module, directory / f"{name}.onnx")
    del module, traced
    for extension in extensions:
        graphs |= _extend(extension, name, graphs, parts[-1:], directory)
    on_stage(f"{name}: check")
    return _checked(name, graphs, parts, dtype, directory, dims, truth)


def _truth(module: TracedModule, extensions: Sequence[Extension], dims: Mapping[str, int]) -> Truth:
    """Draw inputs and run PyTorch on them, as it is and as each extension has it."""
    inputs = module.example(dims, SEED)
    given = {spec.name: spec.resolve(dims) for extension in extensions for spec in extension.inputs}
    added = verify.inputs(given.values(), SEED)
    expected = {"": _outputs(module, inputs)}
    for extension in extensions:
        with extension.eager(module.model, {n: torch.from_numpy(value) for n, value in added.items()}) as more:
            found = _outputs(module, inputs)
        expected[extension.variant] = found | {n: value.detach().numpy() for n, value in more.items()}
    feed = {spec.name: value.numpy() for spec, value in zip(module.inputs, inputs, strict=True)}
    return Truth(feed | added, expected)


def _outputs(module: TracedModule, inputs: Sequence[torch.Tensor]) -> dict[str, np.ndarray]:
    return {spec.name: value.numpy() for spec, value in zip(module.outputs, module.run(inputs), strict=True)}


def _write(traced: ir.Model, module: TracedModule, file: Path) -> tuple[dict[str, Saved], list[str]]:
    """Save a traced module and the parts that it is cut into; returns all by name, and the names of the parts."""
    ir.save(traced, file, external_data=f"{file.name}.data")
    graphs = {file.stem: Saved(module.inputs, module.outputs, count_sites(traced.graph))}
    for value in traced.graph.initializers.values():
        value.const_value = None  # onnxscript's rewrite rules remember the last graph that they have seen
    if not module.cuts:
        return graphs, []
    cut = hoist(ir.load(file), {cut.part: cut.reads for cut in module.cuts}, module.inputs, module.outputs,
                {cut.part: cut.shape for cut in module.cuts if cut.shape})
    parts = {f"{file.stem}_{name}": part for name, part in cut.items()}
    for name, part in parts.items():
        ir.save(part.model, file.with_name(f"{name}.onnx"))
        graphs[name] = Saved(part.inputs, part.outputs, count_sites(part.model.graph))
    return graphs, list(parts)


def _extend(extension: Extension, name: str, graphs: Mapping[str, Saved], body: Sequence[str],
            directory: Path) -> dict[str, Saved]:
    """Save what an extension makes of the graph `name` and of its body."""
    made = {}
    for plain in (name, *body):
        base, target = (_named(plain, name, variant) for variant in (extension.base, extension.variant))
        model = ir.load(directory / f"{base}.onnx")
        count = extension.rewrite(model)
        ir.save(model, directory / f"{target}.onnx")
        logger.info("%s: %d places rewritten in %s", target, count, base)
        graph = graphs[plain]
        made[target] = Saved((*graph.inputs, *extension.inputs), (*graph.outputs, *extension.outputs),
                             count_sites(model.graph))
    return made


def _named(plain: str, name: str, variant: str) -> str:
    """Return the name of a variant of graph `plain`, which is `name` or a part of it."""
    return plain.replace(name, f"{name}_{variant}", 1) if variant else plain


def _checked(name: str, graphs: Mapping[str, Saved], parts: Sequence[str], dtype: str, directory: Path,
             dims: Mapping[str, int], truth: Truth) -> dict[str, Component]:
    """Compare every graph with PyTorch, the parts of each together; returns the components by name."""
    weights = hash_files(directory, [f"{name}.onnx.data"])

    def checked(names: Sequence[str], expected: Arrays, reference: str) -> dict[str, Component]:
        unchecked = Check("not checked", SEED, 0.0, 0.0)
        found = {n: Component(f"{n}.onnx", hash_files(directory, [f"{n}.onnx"]) | weights, dtype, *graphs[n], unchecked)
                 for n in names}
        check = _check(list(found.values()), directory, dims, truth.feed, expected, reference)
        logger.info("%s: %s, relative RMS %.1e", ", ".join(names), dtype, check.rel_rms)
        return {n: dataclasses.replace(component, check=check) for n, component in found.items()}

    components: dict[str, Component] = {}
    for variant, outputs in truth.expected.items():
        components |= checked([_named(name, name, variant)], outputs, REFERENCE)
        if parts:
            together = [*parts[:-1], _named(parts[-1], name, variant)]
            found = checked(together, outputs, f"{REFERENCE}, the parts together")
            components |= {n: component for n, component in found.items() if n not in components}
    return components


def _check(parts: Sequence[Component], directory: Path, dims: Mapping[str, int], feed: Arrays,
           expected: Arrays, reference: str) -> Check:
    """Run saved graphs, one after another, in onnxruntime on the CPU, widened to float32 if they are of 16 bits.

    What is then measured is the graph and the rounding of its weights: the CPU has no kernels for most 16-bit
    operators, and how an engine rounds in between is measured when it is built.
    """
    arrays = dict(feed)
    try:
        for part in parts:
            given = {spec.name: arrays[spec.name] for spec in part.inputs}
            arrays |= verify.run_reference(
                Target(directory, part.file, part, EngineConfig("onnxruntime", dims)), given)
        what = f"{', '.join(part.file for part in parts)} in {parts[0].dtype}"
        return verify.compare(arrays, expected, parts[0].dtype, what, SEED, reference)
    except EngineError as e:
        raise ExportError(f"{e}; nothing was published") from e


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Switch off the bars that the libraries draw under ours; both settings are global, so they are put back."""
    enabled = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in enabled:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in enabled:
            log.enable_progress_bar()
