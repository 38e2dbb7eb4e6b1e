"""One module as components: its precision, what is refused, and what is in memory meanwhile."""

from __future__ import annotations

import gc
import os
import weakref

import numpy as np
import onnx_ir as ir
import pytest

from export import ExportError
from export.families.family import Family
from export.sources.folder import Folder
from export.trace import component, trace
from export.trace.component import export_component
from tests.tolerances import EXPORT_REL_RMS
from tests.tools.graphs import opened

UNET_PARTS = ("unet_text", "unet_time", "unet_body", "unet_control", "unet_control_body", "unet_frames",
              "unet_frames_body")


@pytest.fixture(scope="module")
def small(checkpoints) -> Family:
    """An SD 2 with two UNet levels, which traces in half the time."""
    return opened(checkpoints["sd2"])


@pytest.mark.parametrize("name, dtype", [("vae_decoder", "fp16"), ("text_encoder", "fp16"), ("unet", "bf16"),
                                         pytest.param("unet", "fp16", marks=pytest.mark.slow)])
def test_16_bit_component(small, tmp_path, name, dtype):
    """A UNet hands float32 from part to part."""
    made = export_component(name, small, dtype, tmp_path)
    got = made[name]
    assert 0 < got.check.rel_rms < EXPORT_REL_RMS[dtype]
    model = ir.load(tmp_path / got.file)
    outside = {value.dtype.numpy() for value in (*model.graph.inputs, *model.graph.outputs)}
    assert outside <= {np.dtype("float32"), np.dtype("int64")}
    narrow = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[dtype]
    weights = [value for value in model.graph.initializers.values() if value.name.endswith(".weight")]
    assert weights and {value.dtype for value in weights} == {narrow}
    assert list(made) == [name, *(UNET_PARTS if name == "unet" else ())]
    files = [f"{part}.onnx" for part in made]
    assert sorted(os.listdir(tmp_path)) == sorted([*files, f"{name}.onnx.data"])  # the widened copy is gone
    for part in [part for part in made if part != name]:
        assert 0 < made[part].check.rel_rms < EXPORT_REL_RMS[dtype]
        graph = ir.load(tmp_path / f"{part}.onnx").graph
        assert {value.dtype for value in (*graph.inputs, *graph.outputs)} == {ir.DataType.FLOAT}
        if part != "unet_text":  # which is a product with weights, and has no constants
            assert narrow in {value.dtype for value in graph.initializers.values()}


def test_weights_are_gone_before_the_check(small, tmp_path, monkeypatch):
    """A UNet's gigabytes would otherwise be in memory twice."""
    module = small.modules["text_encoder"]().model
    weight = weakref.ref(module.final_layer_norm.weight)
    held, check, found = [module], component._check, []
    del module

    def look(*arguments):
        gc.collect()
        found.append(weight())
        return check(*arguments)

    monkeypatch.setattr(component, "_check", look)
    monkeypatch.setattr(Folder, "load", lambda folder, name, kind: held.pop())
    export_component("text_encoder", small, "fp32", tmp_path)
    assert found == [None]


def test_missing_site_is_an_error(small, tmp_path, monkeypatch):
    def attention(q, k, v, **_):
        return (q @ k.mT).softmax(-1) @ v

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", attention)
    with pytest.raises(ExportError, match="text_encoder: the graph has 0 Attention nodes, the model 2 such modules"):
        export_component("text_encoder", small, "fp32", tmp_path)


def test_graph_over_tolerance_is_an_error(small, tmp_path, monkeypatch):
    def scaled(*arguments):
        model = trace.trace(*arguments)
        weight = model.graph.initializers["final_layer_norm.weight"]
        weight.const_value = ir.tensor(weight.const_value.numpy() * 1.01, name=weight.name)
        return model

    monkeypatch.setattr(component, "trace", scaled)
    with pytest.raises(ExportError, match=r"text_encoder.onnx in fp32: .* differs .* nothing was published"):
        export_component("text_encoder", small, "fp32", tmp_path)
