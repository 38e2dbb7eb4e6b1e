"""Residuals of ControlNets in a UNet: where they are added, and that nothing else changes."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from engines import Bundle
from engines.spec import TensorSpec
from export import ExportError
from export.passes.residuals import add_residuals


@pytest.fixture(scope="module")
def plain(bundles) -> Bundle:
    return Bundle.open(bundles["sd1"])


@pytest.mark.parametrize("name", ["unet", "unet_body"])
def test_the_unet_without_residuals_is_node_for_node_the_same(plain, name):
    """Both are on one weights file, and differ in the sums with residuals alone."""
    control = name.replace("unet", "unet_control")
    graphs = [ir.load(plain.path / plain.component(n).file).graph for n in (name, control)]
    own, changed = ([(node.op_type, tuple(v and v.name for v in node.inputs), tuple(v.name for v in node.outputs))
                     for node in graph if not str(node.name).startswith("residual_")] for graph in graphs)
    added = {str(node.outputs[0].name): str(node.inputs[0].name) for node in graphs[1]
             if str(node.name).startswith("residual_")}
    assert len(added) == 9 and not any("residual" in str(value.name) for value in graphs[0].inputs)
    assert own == [(op, tuple(added.get(v, v) for v in read), made) for op, read, made in changed]
    assert plain.component(name).sites == plain.component(control).sites
    assert set(plain.component(control).files) == {f"{control}.onnx", "unet.onnx.data"}


def test_a_graph_that_joins_otherwise_is_an_error(plain):
    """As many places as it has residuals are rewritten, and a graph with fewer is refused."""
    name = plain.component("unet_body").file
    specs = [spec for spec in plain.component("unet_control").inputs if spec.name.startswith("residual_")]
    assert add_residuals(specs, ir.load(plain.path / name)) == len(specs) == 9
    more = [*specs, *(TensorSpec(f"residual_{n}", "float32", ("batch", 8, 1, 1)) for n in (9, 10))]
    with pytest.raises(ExportError, match="unet: the graph joins 8 skip connections, expected 10"):
        add_residuals(more, ir.load(plain.path / name))
