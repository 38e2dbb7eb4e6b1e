"""Attention across frames, put into a UNet: how many layers, and what is refused."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from engines import Bundle
from export import ExportError
from export.families.extensions import frame_specs
from export.passes.frames import add_frames
from tests.tools.graphs import opened


def test_every_layer_on_the_way_up_is_rewritten(checkpoints, bundles):
    """Once each; and a layer that the graph does not have is an error."""
    bundle = Bundle.open(bundles["sd2"])
    specs = frame_specs(opened(checkpoints["sd2"]).modules["unet"]().model)
    layers = [f"up_blocks.1.attentions.{n}.transformer_blocks.0.attn1" for n in range(2)]
    graph = ir.load(bundle.path / bundle.component("unet").file)
    before = len([node for node in graph.graph if node.op_type == "Where"])
    assert add_frames(layers, specs, graph) == 2
    assert len([node for node in graph.graph if node.op_type == "Where"]) == before + 4
    named = [str(value.name) for value in graph.graph.outputs]
    assert named == ["noise_pred", "hidden_0", "hidden_1"]
    with pytest.raises(ExportError, match=r"unet: the graph has no product with up_blocks\.9\.attn1\.to_k\.weight"):
        add_frames([layers[0], "up_blocks.9.attn1"], specs, ir.load(bundle.path / bundle.component("unet").file))
