"""One build of a graph: what TensorRT reads, refuses and names, and what a failed build leaves."""

import ast
import dataclasses
import operator
import os
import re
from pathlib import Path

import onnx
import pytest
from onnx import helper

from engines.backend import Target
from engines.spec import EngineError
from engines.tensorrt import choice, vendor
from engines.tensorrt.backend import RTX
from engines.tensorrt.build import parse
from engines.tensorrt.record import ABOUT, PLAN
from tests.cases.tensorrt import config, needs_rtx, unet_request, without_gpu

ROOT = Path(__file__).parents[3]

pytestmark = needs_rtx


def target(directory, bundle, inputs=("sample",)):
    """The UNet of `bundle` with these inputs alone, as the graph other.onnx in `directory`."""
    component = bundle.component("unet")
    component = dataclasses.replace(component, file="other.onnx",
                                    inputs=tuple(s for s in component.inputs if s.name in inputs))
    return Target(directory, "unet", component, config(bundle))


def build_graph(path, bundle, nodes, inputs=("sample",), outputs=("noise_pred",)):
    """Build a graph of `nodes` in place of the bundle's UNet."""
    shape = ["batch", 4, "latent_height", "latent_width"]
    values = [[helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in names]
              for names in (inputs, outputs)]
    model = helper.make_model(helper.make_graph(nodes, "graph", *values), opset_imports=[helper.make_opsetid("", 23)],
                              ir_version=11)
    onnx.save(model, path / "other.onnx")
    RTX.build(target(path, bundle, inputs), path)


def test_a_graph_it_cannot_read_names_file_and_node(bundle, tmp_path):
    nodes = [helper.make_node("Relu", ["sample"], ["x"]), helper.make_node("Det", ["x"], ["noise_pred"], "the_det")]
    with pytest.raises(EngineError, match=r"cannot read .*other.onnx: node 1 'the_det' \(Det\): UNSUPPORTED_NODE"):
        build_graph(tmp_path, bundle, nodes)
    (tmp_path / "other.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"cannot read .*other.onnx: MODEL_DESERIALIZE_FAILED"):
        RTX.build(target(tmp_path, bundle), tmp_path)
    assert not (tmp_path / PLAN).exists()


def test_a_graph_that_is_not_what_the_manifest_says_is_refused(bundle, tmp_path):
    with pytest.raises(EngineError, match=r"graph outputs of .*got \{'other': \(2, 4, 8, 8\)\}, expected \{'noise"):
        build_graph(tmp_path, bundle, [helper.make_node("Relu", ["sample"], ["other"])], outputs=["other"])


def test_a_graph_in_memory_finds_its_weights_beside_the_file(bundle):
    """So that a graph with plugin nodes need not be written, nor its weights copied."""
    file, trt, request = bundle.path / "unet.onnx", vendor.package("tensorrt-rtx"), unet_request(bundle)
    builder = trt.Builder(vendor.log(trt))
    counts = [parse(trt, builder, request, model).num_layers for model in (None, file.read_bytes())]
    assert counts[0] == counts[1] > 0
    os.remove(bundle.path / "unet.onnx.data")
    with pytest.raises(EngineError, match=r"cannot read .*unet.onnx"):
        parse(trt, builder, request, file.read_bytes())


@without_gpu
def test_a_build_with_plugins_that_fails_leaves_the_other(bundle, tmp_path, monkeypatch):
    """TensorRT-RTX has none, which shows after the kernel of the site has been compiled."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    choice.build(unet_request(bundle, tmp_path), {"norm": "auto", "attention": "vendor"})
    about = RTX.details(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [PLAN, ABOUT]
    assert about["kernels"] == {"attention": {"asked": "vendor", "used": "vendor"},
                                "norm": {"asked": "auto", "used": "vendor"}}
    assert list(about["failed"]) == ["norm"] and "got no plugins in Python" in about["failed"]["norm"]
    assert about["timings"] == []


def test_names_of_tensorrt_are_those_of_the_library():
    """Every `trt.Name.NAME` in the source is in a library of TensorRT 11's interface: nothing removed is used."""
    trt, found = vendor.package("tensorrt-rtx"), set()
    for file in sorted((ROOT / "engines" / "tensorrt").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf8"))):
            if isinstance(node, ast.Attribute):
                found |= {*re.findall(r"^(?:self\._)?trt\.([\w.]+)$", ast.unparse(node))}
    assert {"ILogger.__init__", "TensorIOMode.OUTPUT", "ExecutionContextAllocationStrategy.USER_MANAGED"} <= found
    for name in found:
        assert operator.attrgetter(name)(trt) is not None, name
