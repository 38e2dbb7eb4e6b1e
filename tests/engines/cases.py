"""What the tests of every backend and of the store share: backends, engines of the small bundle, its UNet in torch."""

import contextlib
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import engines
from engines.check import compare

BACKENDS = [name for name in engines.BACKENDS if not engines.backend(name).on_gpu and name != "inductor"]
"""Backends whose engines are made in no time; tests/engines/inductor/ asks the same of the one that compiles C++."""
SHAPES = [pytest.param(64, 64, 1, id="64x64-1"), pytest.param(64, 96, 2, id="64x96-2")]


def has(dtype: str) -> bool:
    return dtype in engines.backend("openvino").dtypes()


CASES = [("onnxruntime", "fp32"), ("openvino", "fp32"),
         *(pytest.param("openvino", d, marks=pytest.mark.skipif(not has(d), reason=f"this CPU does not compute in {d}"))
           for d in ("bf16", "fp16"))]


def config(bundle, backend="openvino", component="unet", size=(64, 64), batch=1, **rest):
    return bundle.config(component, backend=backend, size=size, batch=batch, **rest)


def rel_rms(got, expected):
    return np.sqrt(np.mean((got - expected) ** 2) / np.mean(np.square(expected)))


def weights(bundle, component="unet"):
    model = onnx.load(bundle.path / bundle.component(component).file)
    return {w.name: numpy_helper.to_array(w).astype(np.float64) for w in model.graph.initializer}


def unet(w, feed):
    """The small UNet in torch, float64."""
    import torch

    functional = torch.nn.functional
    w = {name: torch.from_numpy(value) for name, value in w.items()}
    feed = {name: torch.from_numpy(value).double() for name, value in feed.items()}
    angle = feed["timestep"][:, None] * w["frequencies"]
    time = torch.cat([angle.sin(), angle.cos()], 1) @ w["time.weight"]
    x = functional.conv2d(feed["sample"], w["conv_in.weight"], w["conv_in.bias"], padding=1) + time[:, :, None, None]
    tokens = functional.silu(functional.group_norm(x, 8, w["norm.weight"], w["norm.bias"])).flatten(2).transpose(1, 2)
    text = feed["encoder_hidden_states"]
    q, k, v = ((s @ w[f"{n}.weight"]).unflatten(2, (4, -1)).transpose(1, 2)
               for n, s in (("query", tokens), ("key", text), ("value", text)))
    tokens = tokens + functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    tokens = functional.gelu(functional.layer_norm(tokens, (32,), w["layer.weight"]))
    return functional.conv2d(tokens.transpose(1, 2).reshape(x.shape), w["conv_out.weight"], padding=1).numpy()


def bound(engine, seed=0):
    """The engine's buffers, bound, with seeded inputs."""
    buffers = {**compare.inputs(engine.inputs.values(), seed), **{n: s.empty() for n, s in engine.outputs.items()}}
    engine.bind(buffers)
    return buffers


@contextlib.contextmanager
def without_backend(name: str) -> Iterator[None]:
    """A version of latentrt that does not have a backend, in the block."""
    before = dict(engines.BACKENDS)
    del engines.BACKENDS[name]
    try:
        yield
    finally:
        engines.BACKENDS.clear()
        engines.BACKENDS.update(before)
