"""Graphs as torch modules, run eagerly: each graph and each operator equals ONNX Runtime, on either's kernels."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper as h

from engines.backend import Target
from engines.bundle import Bundle
from engines.check import compare
from engines.inductor.options import KINDS
from engines.spec import EngineError
from tests.engines.cases import rel_rms
from tests.engines.inductor.graphs import config, proto
from tests.tolerances import ENGINE_REL_RMS

torch = pytest.importorskip("torch")

from engines.inductor.torch.run import Settings  # noqa: E402
from tests.tools.torch_modules import run, shapes_of, torch_module  # noqa: E402

ROOT = Path(__file__).parents[3]
COMPONENTS = ["text_encoder", "unet", "vae_decoder", "vae_encoder"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize(("model", "kernels"), [("sd1", frozenset()), ("sd2", frozenset()), ("sd2", frozenset(KINDS))],
                         ids=["sd1-vendor", "sd2-vendor", "sd2-ours"])
def test_every_graph_in_torch_equals_the_reference(bundles, model, component, dtype, kernels):
    """With our operators too, which on a CPU are their references: they are given what the sites mean."""
    bundle = Bundle.open(bundles[model])
    target = Target.of(bundle, component, config(bundle, component))
    feed = compare.inputs(target.inputs.values(), 4)
    expected = compare.run_reference(target, feed)
    module = torch_module(target.onnx, shapes_of(target), Settings(dtype, kernels))
    for name, value in run(module, feed).items():
        assert value.dtype == np.float32
        assert rel_rms(value, expected[name]) < ENGINE_REL_RMS[dtype]
    used, sites = module.learned.used, bundle.component(component).sites
    counted = {kind: sum(n for (site, _), n in used.items() if site == kind) for kind in KINDS}
    assert counted["attention"] == sites["Attention"]
    assert counted["norm"] == sites.get("GroupNormalization", 0)
    assert counted["layer_norm"] == sites.get("LayerNormalization", 0)
    assert counted["geglu"] == (sites["Gelu"] if component == "unet" else 0)
    if model == "sd2" and component == "unet":  # heads of 64: all are ours
        assert {whose for _, whose in used} == {"ours" if kernels else "vendor"}


def test_the_pooled_text_of_xl_is_that_of_its_end(bundles):
    """Which is picked by its id, with operators that no other graph has."""
    bundle = Bundle.open(bundles["sdxl"])
    target = Target.of(bundle, "text_encoder_2", config(bundle, "text_encoder_2"))
    feed = compare.inputs(target.inputs.values(), 4)
    feed["input_ids"][:, 9:], feed["placed"][:] = 527, -1
    expected = compare.run_reference(target, feed)
    for name, value in run(torch_module(target.onnx, shapes_of(target)), feed).items():
        assert rel_rms(value, expected[name]) < ENGINE_REL_RMS["fp32"]


@pytest.mark.parametrize(("kind", "domain", "message"), [
    ("Det", "", "got operator Det in the graph, expected one of Add"),
    ("Linear", "", "got operator Linear in the graph, expected one of Add"),
    ("Linear", "latentrt", "got operator latentrt::Linear, expected ONNX's own"),
], ids=["unknown", "ours in ONNX's domain", "of another domain"])
def test_an_operator_that_is_not_known_is_named(tmp_path, kind, domain, message):
    onnx.save(proto([h.make_node(kind, ["x"], ["y"], domain=domain)], {}, {"x": (2, 3, 3)}), tmp_path / "x.onnx")
    with pytest.raises(EngineError, match=message):
        torch_module(tmp_path / "x.onnx", {"x": ((2, 3, 3), "float32")})


PADS = h.make_node("Conv", ["x", "w"], ["y"], pads=[0, 1, 2, 0], strides=[2, 1], kernel_shape=[3, 2])
RESIZES = {"asymmetric": {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}, "default": {}}


@pytest.mark.parametrize("nodes", [
    [PADS], [h.make_node("Resize", ["x", "", "twice"], ["y"], **RESIZES["asymmetric"])],
    [h.make_node("Resize", ["x", "", "twice"], ["y"])],
    [h.make_node("Slice", ["x", "one", "many", "one", "two"], ["y"])],
    [h.make_node("Gather", ["x", "index"], ["y"], axis=2)], [h.make_node("Gather", ["x", "scalar"], ["y"], axis=1)],
    [h.make_node("Shape", ["x"], ["s"], start=2), h.make_node("Concat", ["minus", "s"], ["c"], axis=0),
     h.make_node("Reshape", ["x", "c"], ["y"])],
    [h.make_node("Attention", ["x", "x", "x", "causal"], ["y"])],
    [h.make_node("Attention", ["x", "x", "x", "mask"], ["y"])],
    [h.make_node("Attention", ["x", "x", "x"], ["y"], is_causal=1, scale=0.3)],
    [h.make_node("Transpose", ["g"], ["gt"], perm=[1, 0]), h.make_node("MatMul", ["x", "gt"], ["m"]),
     h.make_node("Add", ["bias", "m"], ["y"])],
    [h.make_node("Clip", ["x", "low"], ["y"])], [h.make_node("Conv", ["x", "w1", "b1"], ["y"])],
    [h.make_node("ConvTranspose", ["x", "wt", "b1"], ["y"], pads=[1, 0, 1, 0], strides=[2, 3], output_padding=[1, 0])],
    [h.make_node("Pad", ["x", "around"], ["y"])], [h.make_node("ReduceSum", ["x", "one"], ["y"], keepdims=0)],
    [h.make_node("Relu", ["x"], ["y"])],
    [h.make_node("ArgMin", ["x"], ["i"], axis=2, keepdims=0), h.make_node("Cast", ["i"], ["y"], to=1)],
    [h.make_node("Cast", ["x"], ["whole"], to=7), h.make_node("Equal", ["whole", "scalar"], ["e"]),
     h.make_node("Cast", ["e"], ["n"], to=6), h.make_node("ArgMax", ["n"], ["i"], axis=3, keepdims=0),
     h.make_node("Range", ["nought", "six", "scalar"], ["r"]), h.make_node("Max", ["i", "r"], ["m"]),
     h.make_node("Unsqueeze", ["m", "last"], ["u"]), h.make_node("GatherND", ["bias", "u"], ["y"])],
], ids=["pads", "resize", "resize half_pixel", "slice", "gather", "gather one", "reshape", "causal mask", "mask",
        "causal", "linear", "clip", "one channel", "transposed", "zeros", "sum", "relu", "argmin", "pick"])
def test_operators_equal_onnxruntime(tmp_path, nodes):
    import onnxruntime

    rng = np.random.default_rng(0)
    initializers = {
        "w": rng.standard_normal((5, 4, 3, 2)).astype(np.float32), "twice": np.float32([1, 1, 2, 3]),
        "one": np.int64([1]), "two": np.int64([2]), "many": np.int64([2**62]), "index": np.int64([[0, 5], [2, 2]]),
        "scalar": np.int64(1), "nought": np.int64(0), "six": np.int64(6), "last": np.int64([3]),
        "minus": np.int64([2, -1]), "causal": np.tri(6, dtype=bool)[None, None],
        "mask": rng.random((6, 6)) < 0.7, "g": rng.standard_normal((7, 6)).astype(np.float32),
        "w1": rng.standard_normal((1, 4, 3, 2)).astype(np.float32),
        "wt": rng.standard_normal((4, 1, 3, 2)).astype(np.float32), "b1": np.float32([0.3]),
        "around": np.int64([0, 0, 1, 0, 0, 0, 2, 3]), "bias": rng.standard_normal(7).astype(np.float32),
        "low": np.float32(-0.5)}
    used = {name for node in nodes for name in node.input}
    initializers = {name: value for name, value in initializers.items() if name in used}
    file = tmp_path / "x.onnx"
    onnx.save(proto(nodes, initializers, {"x": (2, 4, 6, 6)}), file)
    x = rng.standard_normal((2, 4, 6, 6)).astype(np.float32)
    expected = onnxruntime.InferenceSession(file).run(None, {"x": x})[0]
    got = run(torch_module(file, {"x": (x.shape, "float32")}), {"x": x})["y"]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_gpu_graph_holds_our_kernels(bundles):
    """Traced for a GPU that is not here: torch.export sees our operators at every site, its compiler their kernels."""
    code = textwrap.dedent(f"""
        import dataclasses, json
        from collections import Counter
        import torch
        import triton
        from torch._functorch.aot_autograd import aot_export_module
        from torch._subclasses.fake_tensor import FakeTensorMode
        from engines import Bundle
        from engines.backend import Target
        from engines.inductor import passes
        from engines.inductor.options import KINDS
        from engines.inductor.torch.module import OnnxModule, survey
        from engines.inductor.torch.parameters import large_linears
        from engines.inductor.torch.run import Settings
        from tests.engines.inductor.graphs import config
        from tests.tools.torch_modules import shapes_of

        class Hopper:
            get_current_target = staticmethod(lambda: triton.backends.compiler.GPUTarget("cuda", 90, 32))

        # A PyTorch without CUDA refuses to ask the device, and this method of its tensors.
        torch.cuda.get_device_capability = lambda device=None: (9, 0)
        torch.Tensor.contiguous = lambda x, memory_format=torch.contiguous_format: torch.ops.aten.contiguous(
            x, memory_format=memory_format)
        bundle = Bundle.open({str(bundles["sd2"])!r})
        target = Target.of(bundle, "unet", config(bundle))
        shapes, model = shapes_of(target), passes.read(target.onnx)
        passes.rewrite(model, True)
        with FakeTensorMode(), torch.no_grad():
            settings = Settings("fp16", frozenset(KINDS))
            found = survey(model.graph, shapes, settings)
            settings = dataclasses.replace(settings, fp8=large_linears(model.graph, found.rows, 32))
            module = OnnxModule(model.graph, settings, "cuda:0", found.constants)
            x = tuple(torch.zeros(shapes[value.name][0], device="cuda:0") for value in model.graph.inputs)
            program = torch.export.export(module, x, strict=False)
            ops = Counter(str(node.target) for node in program.graph.nodes if "latentrt" in str(node.target))
            triton.runtime.driver.set_active(Hopper())
            traced, _ = aot_export_module(program.module(), x, trace_joint=False, decompositions={{}})
        kernels = [node for node in traced.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
        products = sum("_scaled_mm" in str(node.target) for node in traced.graph.nodes)
        print(json.dumps([products, module.learned.used["linear", "fp8"], ops,
                          [node.kwargs["tensors_to_clone"] for node in kernels],
                          [str(node.target) for node in traced.graph.nodes if "latentrt" in str(node.target)]]))
    """)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    products, in_fp8, ops, written, left = json.loads(done.stdout)
    assert products == in_fp8 > 10
    sites = Bundle.open(bundles["sd2"]).component("unet").sites
    assert ops == {"latentrt.attention.default": sites["Attention"], "latentrt.geglu.default": sites["Gelu"],
                   "latentrt.group_norm.default": sites["GroupNormalization"],
                   "latentrt.layer_norm.default": sites["LayerNormalization"]}
    assert left == [] and len(written) >= sum(ops.values())
    assert {name for names in written for name in names} <= {"out_ptr", "parts_ptr"}  # nothing else is thought written
