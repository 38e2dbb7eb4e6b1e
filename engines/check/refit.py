"""New weights: refit an engine, and compare it with the reference that was given the same weights.

NVIDIA documents for TensorRT 11.3 that a plan built for REFIT may drop the bias of a matrix product. Against the
reference all biases together show; a single one may be less than the tolerance there (3e-5 of the output, in the middle
of a small UNet). So each is changed alone as well, and has to change the output. Reading the graph needs onnx_ir.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engines.backend import Engine, Target, backend
from engines.bundle import Bundle, Check
from engines.check import compare
from engines.spec import EngineConfig, EngineError

NOISE = 0.05
"""Change of a weight, as a share of its own size."""
SHIFT = 0.5
"""Change of a bias, as a share of the RMS that its product has where the inputs' RMS is 1."""

logger = logging.getLogger(__name__)


def check(bundle: Bundle, name: str, config: EngineConfig, directory: Path,
          weights: Mapping[str, np.ndarray] | None = None, seed: int = compare.SEED) -> Check:
    """Refit the engine in `directory`, compare it with the ONNX Runtime float32 reference, and return the figures.

    weights: initializer → new value, by default those of `perturbed` that the engine has kept apart (its attribute
    `refittable`). The engine on disk does not change. Raises EngineError where an output is over the
    tolerance of what it computes in, has NaN or Inf, a bias changes nothing, or nothing can be changed.
    """
    target = Target.of(bundle, name, config)
    engine = backend(config.backend).load(target, directory)
    if weights is None:
        weights = perturbed(target.onnx, seed, engine.refittable)
    figures = against_reference(engine, target, weights, seed)
    if lost := ignored(engine, target.onnx, weights, seed):
        raise EngineError(f"{config.backend} {config.dtype} engine of {name}: got the same output with other values of "
                          f"{len(lost)} biases ({', '.join(lost[:3])}), expected another; build it without "
                          "--option refit=true, or with another version of the library")
    return figures


def ignored(engine: Engine, onnx: Path, weights: Mapping[str, np.ndarray], seed: int = compare.SEED) -> list[str]:
    """Return the biases among `weights` whose sign changes nothing in what an open engine gives; it keeps `weights`.

    The sign of each is turned alone. What two runs differ by without any change counts as the same.
    """
    feed = compare.inputs(engine.inputs.values(), seed)
    engine.refit(weights)
    before, again = compare.run(engine, feed), compare.run(engine, feed)
    noise = 2 * _difference(before, again)
    lost = []
    for name in sorted(biases(onnx) & set(weights)):
        engine.refit({name: -np.asarray(weights[name])})
        after = compare.run(engine, feed)
        if _difference(before, after) <= noise:
            lost.append(name)
        before = after
    engine.refit(weights)
    return lost


def _difference(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    return max(float(np.abs(a[name].astype(np.float64) - b[name]).max()) for name in a)


def against_reference(engine: Engine, target: Target, weights: Mapping[str, np.ndarray],
                      seed: int = compare.SEED) -> Check:
    """Return the figures of an open engine, which keeps the new weights; raises as `check` does."""
    if not weights:
        raise EngineError(f"{target.onnx}: got no weight to change, expected one that the engine can replace; "
                          "build it with --option refit=true")
    feed = compare.inputs(engine.inputs.values(), seed)
    with compare.open_reference(target) as reference:
        reference.refit(weights)
        expected = compare.run(reference, feed)
    config = target.config
    engine.refit(weights)
    return compare.arrays(compare.run(engine, feed), expected, compare.precision(engine, config),
                          f"{config.backend} {config.dtype} engine with {len(weights)} new weights", seed,
                          f"{compare.REFERENCE} with the same weights")


def perturbed(onnx: Path, seed: int, only: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Return new values, float32, for the weights and biases of the convolutions and matrix products of an ONNX file.

    only: the names to keep; None for all. Raises EngineError without onnx_ir.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}
    for weight, fan_in, bias in _products(onnx):
        value = weight.const_value.numpy().astype(np.float32)
        scale = float(np.sqrt(np.mean(np.square(value)))) * math.sqrt(fan_in)
        if weight.name not in found:
            found[weight.name] = value * (1 + NOISE * rng.standard_normal(value.shape, np.float32))
        if bias is not None and bias.name not in found:
            value = bias.const_value.numpy().astype(np.float32)
            found[bias.name] = value + SHIFT * scale * rng.standard_normal(value.shape, np.float32)
    if only is not None and (fixed := sorted(set(found) - set(only))):
        logger.info("%s: not checked, for the build has folded them away: %s", onnx, ", ".join(fixed))
    return {name: value for name, value in found.items() if only is None or name in only}


def biases(onnx: Path) -> set[str]:
    """Return the initializers that are added to a convolution or matrix product."""
    return {bias.name for _, _, bias in _products(onnx) if bias is not None}


def _products(onnx: Path) -> list[tuple[Any, int, Any]]:
    """Return (weight, number of products summed, bias or None) of every Conv, Gemm and MatMul with a stored weight."""
    try:
        import onnx_ir as ir
    except ImportError as e:
        raise EngineError("checking new weights needs onnx_ir, which is missing; run: pip install onnx-ir") from e
    found = []
    for node in ir.load(onnx).graph:
        if node.domain != "" or node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        weight, turned = _stored(node.inputs[1])
        if weight is None:
            continue
        shape = weight.shape.numpy()
        bias = None
        if node.op_type == "MatMul":
            adds = [use.node for use in node.outputs[0].uses() if use.node.op_type == "Add"]
            operands = [_stored(value)[0] for add in adds for value in add.inputs]
            bias = next((value for value in operands if value is not None), None)
            fan_in = shape[-1 if turned else -2]
        else:
            bias = _stored(node.inputs[2])[0] if len(node.inputs) > 2 else None
            across = node.op_type == "Conv" or ("transB" in node.attributes and node.attributes["transB"].value)
            fan_in = math.prod(shape[1:]) if across != turned else shape[0]
        found.append((weight, fan_in, bias))
    return found


def _stored(value: Any) -> tuple[Any, bool]:
    """Return (the floating-point initializer that `value` is or None, whether it is transposed)."""
    turned = False
    while value is not None and (node := value.producer()) is not None and node.op_type in ("Cast", "Transpose"):
        turned ^= node.op_type == "Transpose"
        value = node.inputs[0]
    stored = value is not None and value.is_initializer() and value.dtype.is_floating_point()
    return (value if stored else None), turned
