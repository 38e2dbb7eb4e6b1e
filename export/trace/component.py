"""A model's network becomes components of a bundle: it is loaded, traced, saved, and compared with PyTorch."""

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
from engines.check import compare
from engines.spec import EngineConfig, EngineError
from export.errors import ExportError
from export.families.family import Model
from export.passes.hoist import hoist
from export.trace.sites import check_sites, count_sites
from export.trace.trace import trace
from export.trace.traced_module import Extension, TracedModule

logger = logging.getLogger(__name__)

STAGES = ("load", "trace", "save", "check")
"""Stages of the export of one network."""

REFERENCE = "PyTorch eager, float32"

SEED = 1234
"""Seed of the inputs that a graph is checked with."""

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Arrays = Mapping[str, np.ndarray]
Graphs = dict[tuple[str, str], Component]
"""(part, variant) → the graph of a network, in the order in which they are written."""


class Truth(NamedTuple):
    """Inputs, and what PyTorch makes of them. feed: by name. expected: variant ("" for the plain graph) → outputs."""

    feed: dict[str, np.ndarray]
    expected: dict[str, dict[str, np.ndarray]]


def export_components(model: Model, dtype: str, directory: Path, progress: bool = True) -> dict[str, Component]:
    """Write all of a model's networks into `directory`, and check them; returns the components by name.

    dtype: of the bundle. progress: draw a bar if stderr is a terminal. Raises ExportError.
    """
    networks = tuple(model.modules)
    with tqdm(total=len(STAGES) * len(networks), disable=None if progress else True, leave=False, unit="stage") as bar:
        def on_stage(stage: str) -> None:
            bar.set_description(stage)
            bar.update()

        components: dict[str, Component] = {}
        for network in networks:
            components |= export_component(network, model, model.precision(network, dtype), directory, on_stage)
    return components


def export_component(network: str, model: Model, dtype: str, directory: Path,
                     on_stage: Callable[[str], None] = lambda stage: None) -> dict[str, Component]:
    """Write `directory`/`network`.onnx and `network`.onnx.data, and check them; `on_stage` hears of each of STAGES.

    Returns the components by their names: the whole network, the parts that it is cut into, and the module's extensions
    of both. Only one module's weights are in memory at a time, and PyTorch's are gone before onnxruntime reads the
    file. Raises ExportError where a graph is further from PyTorch than `engines.check.tolerance.TOLERANCE`.
    """
    on_stage(f"{network}: load")
    with _no_progress_bars():
        module = model.modules[network]().eval()
    extensions, dims = module.extensions, model.sizes(check=True)
    truth = _truth(module, extensions, dims)
    on_stage(f"{network}: trace")
    traced = trace(module.to(_DTYPES[dtype]), module.example(model.sizes(check=False), seed=0))
    check_sites(traced.graph, module)
    on_stage(f"{network}: save")
    graphs = _write(traced, module, network, dtype, directory)
    del module, traced
    for extension in extensions:
        graphs |= _extend(extension, graphs, directory)
    on_stage(f"{network}: check")
    return {component_name(graph): graph for graph in _checked(graphs, directory, dims, truth).values()}


def component_name(component: Component) -> str:
    """Return the name of a component in its bundle, NETWORK[_VARIANT][_PART]. Only people read anything out of it."""
    return "_".join(word for word in (component.network, component.variant, component.part) if word)


def _truth(module: TracedModule, extensions: Sequence[Extension], dims: Mapping[str, int]) -> Truth:
    """Draw inputs and run PyTorch on them, as it is and as each extension has it."""
    inputs = module.example(dims, SEED)
    given = {spec.name: spec.resolve(dims) for extension in extensions for spec in extension.inputs}
    added = compare.inputs(given.values(), SEED)
    expected = {"": _outputs(module, inputs)}
    for extension in extensions:
        with extension.eager(module.model, {n: torch.from_numpy(value) for n, value in added.items()}) as more:
            found = _outputs(module, inputs)
        expected[extension.variant] = found | {n: value.detach().numpy() for n, value in more.items()}
    feed = {spec.name: value.numpy() for spec, value in zip(module.inputs, inputs, strict=True)}
    return Truth(feed | added, expected)


def _outputs(module: TracedModule, inputs: Sequence[torch.Tensor]) -> dict[str, np.ndarray]:
    return {spec.name: value.numpy() for spec, value in zip(module.outputs, module.run(inputs), strict=True)}


def _write(traced: ir.Model, module: TracedModule, network: str, dtype: str, directory: Path) -> Graphs:
    """Save a traced module, and the parts that it is cut into; their check is still to come."""
    whole = Component(file="", files={}, dtype=dtype, role=module.role, network=network, label=module.label,
                      rows=module.rows, inputs=module.inputs, outputs=module.outputs, sites={},
                      check=Check("not checked", SEED, 0.0, 0.0))
    graphs = {("", ""): _save(traced, whole, directory, weights=f"{network}.onnx.data")}
    for value in traced.graph.initializers.values():
        value.const_value = None  # onnxscript's rewrite rules remember the last graph that they have seen
    if not module.cuts:
        return graphs
    rows = {cut.part: cut.rows for cut in module.cuts}
    parts = hoist(ir.load(directory / f"{network}.onnx"), {cut.part: cut.reads for cut in module.cuts}, module.inputs,
                  module.outputs, {cut.part: cut.shape for cut in module.cuts if cut.shape})
    for name, part in parts.items():
        about = dataclasses.replace(whole, part=name, rows=rows.get(name, whole.rows), inputs=part.inputs,
                                    outputs=part.outputs)
        graphs[name, ""] = _save(part.model, about, directory)
    return graphs


def _extend(extension: Extension, graphs: Graphs, directory: Path) -> Graphs:
    """Save what an extension makes of the whole network and of its body."""
    made = {}
    for part in ("", "body"):
        if (plain := graphs.get((part, ""))) is None:
            continue
        model = ir.load(directory / graphs[part, extension.base].file)
        count = extension.rewrite(model)
        made[part, extension.variant] = graph = _save(model, dataclasses.replace(
            plain, variant=extension.variant, inputs=(*plain.inputs, *extension.inputs),
            outputs=(*plain.outputs, *extension.outputs)), directory)
        logger.info("%s: rewritten in %d places", graph.file, count)
    return made


def _save(model: ir.Model, about: Component, directory: Path, weights: str | None = None) -> Component:
    """Save a graph; returns its component, with its files and sites. weights: the file that they go to.

    Without `weights` they stay in the file of the whole network that the graph was made of.
    """
    file = f"{component_name(about)}.onnx"
    ir.save(model, directory / file, external_data=weights)
    return dataclasses.replace(about, file=file, sites=count_sites(model.graph),
                               files=hash_files(directory, [file, f"{about.network}.onnx.data"]))


def _checked(graphs: Graphs, directory: Path, dims: Mapping[str, int], truth: Truth) -> Graphs:
    """Compare every graph with PyTorch, the parts of each variant together; returns the graphs with their checks."""
    done: Graphs = {}
    parts = [(part, variant) for part, variant in graphs if part and not variant]
    for variant, expected in truth.expected.items():
        for run, reference in (([("", variant)], REFERENCE),
                               ([*parts[:-1], ("body", variant)], f"{REFERENCE}, the parts together")):
            if run[0] in graphs and run[-1] in graphs:
                check = _check([graphs[key] for key in run], directory, dims, truth.feed, expected, reference)
                logger.info("%s: relative RMS %.1e", ", ".join(graphs[key].file for key in run), check.rel_rms)
                done |= {key: dataclasses.replace(graphs[key], check=check) for key in run if key not in done}
    return done


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
            arrays |= compare.run_reference(
                Target(directory, part.file, part, EngineConfig("onnxruntime", dims)), given)
        what = f"{', '.join(part.file for part in parts)} in {parts[0].dtype}"
        return compare.arrays(arrays, expected, parts[0].dtype, what, SEED, reference)
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
