"""Contenders on a CPU: our engines, OpenVINO's and ONNX Runtime's own runtimes, diffusers and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from benchmarks.harness.networks.inputs import engines_of, inputs
from benchmarks.harness.networks.torch_module import configure_compiler, freeze, torch_module
from benchmarks.harness.turns import Contender, Workload
from engines import Bundle, store

Call = Callable[[], np.ndarray]


def ours(backend: str, dtype: str, *, whole: bool = False, **options: Any) -> Contender:
    """Return the contender that is latentrt's engine of one backend and precision on a CPU.

    whole: never in parts. options: those of the engine's config.
    """
    return Contender(partial(_ours, backend, dtype, whole, options), keeps=True, backend=backend, dtype=dtype)


def _ours(backend: str, dtype: str, whole: bool, options: Mapping[str, Any], workload: Workload) -> Call:
    from runtime.devices.bound import BoundEngine

    bundle, feed = Bundle.open(workload.bundle), inputs(workload)
    for name, config in engines_of(workload, bundle, backend, dtype, whole=whole, options=options).items():
        if workload.fresh:
            store.build(bundle, name, config, rebuild=True)
        engine = BoundEngine(store.load(bundle, name, config))
        fed = {name: feed[name] for name in engine.engine.inputs}
        feed |= {name: array.copy() for name, array in engine(**fed).items()}
    output, = engine.engine.outputs
    return lambda: engine(**fed)[output].copy()


def _openvino(precision: str, workload: Workload) -> Call:
    """OpenVINO's own runtime runs the bundle's graph as its documentation shows: read, reshape, compile, infer."""
    import openvino

    bundle, feed, core = Bundle.open(workload.bundle), inputs(workload), openvino.Core()
    model = core.read_model(bundle.path / bundle.component(workload.component).file)
    model.reshape({name: list(array.shape) for name, array in feed.items()})
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision,
                                                 "PERFORMANCE_HINT": "LATENCY"})
    return _warm(lambda: compiled(feed)[0].copy())


def _onnxruntime(workload: Workload) -> Call:
    """ONNX Runtime's own session runs the bundle's graph, with its defaults."""
    import onnxruntime

    bundle, feed = Bundle.open(workload.bundle), inputs(workload)
    session = onnxruntime.InferenceSession(bundle.path / bundle.component(workload.component).file,
                                           providers=["CPUExecutionProvider"])
    return _warm(lambda: session.run(None, feed)[0])


def _diffusers(dtype: str, workload: Workload) -> Call:
    return _torch(dtype, workload, lambda function: function)


def _compiled(dtype: str, workload: Workload) -> Call:
    """torch.compile compiles for this shape, with weights as constants that it may repack (freezing)."""
    configure_compiler(workload)
    freeze()
    import torch

    return _torch(dtype, workload, partial(torch.compile, dynamic=False))


def _torch(dtype: str, workload: Workload, compiler: Callable[[Any], Any]) -> Call:
    import torch

    module = torch_module(workload, dtype, "cpu", compiler)
    return _warm(torch.inference_mode()(lambda: module().float().numpy()))


def _warm(call: Call) -> Call:
    call()
    return call


REFERENCE = "diffusers-fp32"
CONTENDERS = {
    "latentrt-openvino-bf16": ours("openvino", "bf16"),
    "latentrt-inductor-bf16": ours("inductor", "bf16"),
    "openvino-bf16": Contender(partial(_openvino, "bf16")),
    "diffusers-bf16": Contender(partial(_diffusers, "bf16")),
    "diffusers-compile-bf16": Contender(partial(_compiled, "bf16"), keeps=True),
    "latentrt-openvino-plugin-kernels-bf16": ours("openvino", "bf16", whole=True, attention="vendor",
                                                  norm="vendor"),
    "latentrt-openvino-plugin-norm-bf16": ours("openvino", "bf16", whole=True, norm="vendor"),
    "latentrt-openvino-whole-bf16": ours("openvino", "bf16", whole=True),
    REFERENCE: Contender(partial(_diffusers, "fp32")),
    "latentrt-openvino-fp32": ours("openvino", "fp32"),
    "openvino-fp32": Contender(partial(_openvino, "f32")),
    "latentrt-onnxruntime-fp32": ours("onnxruntime", "fp32"),
    "onnxruntime-fp32": Contender(_onnxruntime, graph="fp32"),
}
"""Name → contender. Those with weights in 16 bits come first: memory holds more of them together."""
