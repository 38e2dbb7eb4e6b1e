"""PyTorch module → ONNX graph in the standard's own operators, with symbolic sizes and PyTorch's weight names."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence

import onnx_ir as ir
import onnxscript.optimizer
import onnxscript.rewriter
import torch
from onnx_ir.passes import common

from export.errors import ExportError
from export.trace.traced_module import TracedModule

OPSET = 23

_STATE = "model."  # the attribute of TracedModule that every weight's name starts with


def trace(module: TracedModule, example: Sequence[torch.Tensor]) -> ir.Model:
    """Trace `module` at the sizes of the inputs `example`, which stay symbolic where its specs name them.

    Weights keep PyTorch's names and layout, so that a LoRA or a refit finds them. Raises ExportError where the exporter
    fails.
    """
    shapes = [{i: name for i, name in enumerate(spec.shape) if isinstance(name, str)} for spec in module.inputs]
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                module, **module.call(example, shapes), dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
                input_names=[spec.name for spec in module.inputs], output_names=[spec.name for spec in module.outputs])
        except torch.onnx.OnnxExporterError as e:
            raise ExportError(f"{module.source}: PyTorch could not trace it to ONNX: {e}") from e
        model = program.model
        _simplify(model)
    _rename(model, module)
    return model


def _simplify(model: ir.Model) -> None:
    """Fold what is constant, except what is computed from weights; merge equal nodes; drop the exporter's notes."""
    weights = {name for name in model.graph.initializers if name.startswith(_STATE)}

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(value is not None and value.name in weights for value in node.inputs) else None

    common.InlinePass()(model)
    for _ in range(2):
        onnxscript.optimizer.fold_constants(model, should_fold=should_fold)
        onnxscript.rewriter.rewrite(model)
    ir.passes.Sequential(  # equal constants are merged before they are lifted among the weights, which stay apart
        common.CommonSubexpressionEliminationPass(), common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.ClearMetadataAndDocStringPass(), common.NameFixPass())(model)


def _rename(model: ir.Model, module: TracedModule) -> None:
    """Give inputs and outputs the sizes of their specs, weights their names in the wrapped model.

    The exporter writes sizes as expressions, such as 8*((latent_height - 1)//8) + 8. Between inputs and outputs they
    become unknown; shape inference finds them again when an engine fixes the inputs.
    """
    for node in model.graph:
        for value in node.outputs:
            value.metadata_props.clear()
            if value.shape is not None:
                value.shape = ir.Shape([d if isinstance(d, int) else None for d in value.shape])
    for values, specs in ((model.graph.inputs, module.inputs), (model.graph.outputs, module.outputs)):
        for value, spec in zip(values, specs, strict=True):
            value.metadata_props.clear()
            value.name, value.shape = spec.name, ir.Shape(spec.shape)
            if value.dtype is None or value.dtype.numpy() != spec.dtype:
                raise ExportError(f"{module.source}: traced {spec.name} is {value.dtype}, expected {spec.dtype}")
    for value in list(model.graph.initializers.values()):
        value.metadata_props.clear()
        value.name = str(value.name).removeprefix(_STATE)
    model.graph.name = module.source
    model.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which warns of what does not concern the user (torchvision, axis names, deprecations)."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
