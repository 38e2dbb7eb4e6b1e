"""Our kernels in the place of a graph's own nodes: equal results, sites counted, and what each node launches.

The rewritten graph is evaluated by the ONNX reference, its plugin nodes by launching in Triton's interpreter exactly
what a TensorRT plugin would launch.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper as h
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from engines.bundle import Bundle
from engines.tensorrt import plugins
from engines.tensorrt.plugin_passes import rewrite, rewritten
from kernels.aot import specialise as sites
from kernels.aot.artefact import SCRATCH, Artefact, KernelError
from kernels.aot.specialise import Tensor
from tests.cases.triton import DEVICE
from tests.tolerances import ENGINE_REL_RMS
from tests.tools.small import small_bundle

ROOT = Path(__file__).resolve().parents[3]
ARCH = 90
TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
NUMPY = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16), "fp32": np.dtype(np.float32)}


def run_plugin(name: str, arrays: tuple[np.ndarray, ...], site: str) -> np.ndarray:
    """What the node computes, by the first launch of its plan."""
    words = {dtype: word for word, dtype in NUMPY.items()}
    tensors = [Tensor(a.shape, words[a.dtype]) for a in arrays]
    settings = json.loads(site)
    inputs = [torch.from_numpy(np.ascontiguousarray(a.astype(np.float32))).to(TORCH[words[a.dtype]]).to(DEVICE)
              for a in arrays]
    if settings.get("channels_last"):
        inputs[0] = inputs[0].to(memory_format=torch.channels_last)
    if plugins.PLUGINS[name].output == "parts_ptr":
        out = torch.full(plugins.parts(site), math.nan, device=DEVICE)
    else:
        out = torch.full_like(inputs[0], math.nan)
    plugins.launches(name, tensors, site, ARCH)[0](*inputs, out)
    return out.cpu().float().numpy().astype(np.float32 if out.dtype == torch.float32 else arrays[0].dtype)


def operator(name: str) -> type[OpRun]:
    def run(self: Any, *arrays: np.ndarray, site: str, **_: Any) -> tuple[np.ndarray]:
        return (run_plugin(name, arrays, site),)

    return type(name, (OpRun,), {"op_domain": plugins.DOMAIN, "_run": run})


OPERATORS = [operator(name) for name in plugins.PLUGINS]


def evaluate(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    return ReferenceEvaluator(model, new_ops=OPERATORS).run(None, feed)


def one(nodes: list[onnx.NodeProto], inputs: dict[str, tuple[int, ...]], outputs: list[str], dtype: str,
        weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    kind = h.np_dtype_to_tensor_dtype(NUMPY[dtype])
    graph = h.make_graph(nodes, "one", [h.make_tensor_value_info(n, kind, [f"{n}{i}" for i in range(len(s))])
                                        for n, s in inputs.items()],
                         [h.make_tensor_value_info(n, kind, None) for n in outputs],
                         [numpy_helper.from_array(w, n) for n, w in weights.items()])
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 23)], ir_version=11)


def compare(model: onnx.ModelProto, shapes: dict[str, tuple[int, ...]], dtype: str, kind: str,
            expected: dict[str, int]) -> onnx.ModelProto:
    """Rewrite, twice, which changes nothing the second time, count, and evaluate both; returns the new model."""
    rng = np.random.default_rng(0)
    feed = {n: rng.standard_normal(s).astype(NUMPY[dtype]) for n, s in shapes.items()}
    changed = ir.from_proto(model)
    assert rewrite(changed, shapes, [kind], ARCH) == {kind: expected}
    new = ir.to_proto(changed)
    assert rewrite(changed, shapes, [kind], ARCH) == {kind: {"ours": 0, "vendor": expected["vendor"]}}
    assert ir.to_proto(changed).graph.node == new.graph.node
    wide = ir.to_proto(ir.from_proto(model))
    for got, wanted in zip(evaluate(new, feed), evaluate(wide, feed), strict=True):
        got, wanted = got.astype(np.float64), wanted.astype(np.float64)
        assert got.shape == wanted.shape and np.isfinite(got).all()
        assert np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted ** 2)) < ENGINE_REL_RMS[dtype]
    return new


def attention_model(dtype: str = "fp32", head_dim: int = 40, keys: int = 24, rank: int = 4, swapped: bool = True,
                    two_users: bool = False, is_output: bool = False, mask: bool = False,
                    **attributes: Any) -> tuple[onnx.ModelProto, dict[str, tuple[int, ...]]]:
    """Attention of 3 heads over [2, n, 3, head_dim] if swapped, [2, 3, n, head_dim] if not, or [2, n, 3·head_dim]."""
    def shape(n: int) -> tuple[int, ...]:
        return (2, n, 3 * head_dim) if rank == 3 else (2, n, 3, head_dim) if swapped else (2, 3, n, head_dim)

    shapes = {"q": shape(16), "k": shape(keys), "v": shape(keys)}
    nodes, names = [], ["q", "k", "v"]
    if rank == 4 and swapped:
        nodes = [h.make_node("Transpose", [n], [f"{n}t"], perm=[0, 2, 1, 3]) for n in shapes]
        names = ["qt", "kt", "vt"]
    heads = {"q_num_heads": 3, "kv_num_heads": 3} if rank == 3 else {}
    weights = {"mask": np.zeros((16, keys), NUMPY[dtype])} if mask else {}
    nodes.append(h.make_node("Attention", [*names, *weights], ["a"], **heads, **attributes))
    last = "a"
    if rank == 4 and swapped and not is_output:
        nodes.append(h.make_node("Transpose", ["a"], ["at"], perm=[0, 2, 1, 3]))
        last = "at"
    outputs = ["a"]
    if not is_output:
        nodes.append(h.make_node("Relu", [last], ["y"]))
        outputs = ["y"]
    if two_users:
        nodes.append(h.make_node("Neg", ["a"], ["z"]))
        outputs.append("z")
    return one(nodes, shapes, outputs, dtype, weights), shapes


@pytest.mark.parametrize("options", [
    {}, {"dtype": "fp16"}, {"swapped": False}, {"rank": 3}, {"rank": 3, "dtype": "fp16", "head_dim": 64},
    {"is_causal": 1, "keys": 16}, {"scale": 0.3}, {"two_users": True}, {"head_dim": 160}], ids=str)
def test_attention_becomes_a_plugin_node(options: dict[str, Any]) -> None:
    model, shapes = attention_model(**options)
    new = compare(model, shapes, options.get("dtype", "fp32"), "attention", {"ours": 1, "vendor": 0})
    ops = Counter(node.op_type for node in new.graph.node)
    assert ops["attention"] == 1 and not ops["Attention"]
    assert ops["Transpose"] == (4 if options.get("swapped") is False else 2 if options.get("two_users") else 0)


@pytest.mark.parametrize("options", [{"head_dim": 8}, {"mask": True}, {"softcap": 2.0}, {"is_causal": 1},
                                     {"is_output": True}, {"scale": -1.0}], ids=str)
def test_an_attention_that_ours_cannot_compute_stays(options: dict[str, Any]) -> None:
    model, shapes = attention_model(**options)
    changed = ir.from_proto(model)
    assert rewrite(changed, shapes, ["attention"], ARCH) == {"attention": {"ours": 0, "vendor": 1}}
    assert [n.op_type for n in changed.graph] == [n.op_type for n in model.graph.node]


def test_a_site_whose_kernel_does_not_fit_stays() -> None:
    model, shapes = attention_model()
    asked = []

    def fits(name: str, tensors: Any, site: str) -> bool:
        asked.append((name, [t.shape for t in tensors]))
        return False

    assert rewrite(ir.from_proto(model), shapes, ["attention"], ARCH, fits)["attention"]["vendor"] == 1
    assert asked == [("attention", [(2, 16, 3, 40), (2, 24, 3, 40), (2, 24, 3, 40)])]


def norm_model(dtype: str, shape: tuple[int, ...], silu: str, shared: bool = False) -> onnx.ModelProto:
    rng = np.random.default_rng(1)
    weights = {n: rng.standard_normal(shape[1]).astype(NUMPY[dtype]) for n in ("weight", "bias")}
    nodes = [h.make_node("GroupNormalization", ["x", "weight", "bias"], ["n"], num_groups=4, epsilon=1e-3)]
    nodes += {"none": [h.make_node("Identity", ["n"], ["s"])],
              "silu": [h.make_node("Sigmoid", ["n"], ["g"]), h.make_node("Mul", ["n", "g"], ["s"])],
              "other": [h.make_node("Sigmoid", ["n"], ["g"]), h.make_node("Mul", ["g", "g"], ["m"]),
                        h.make_node("Add", ["m", "n"], ["s"])]}[silu]
    nodes.append(h.make_node("Neg", ["s"], ["y"]))
    if shared:
        nodes.append(h.make_node("Relu", ["n"], ["z"]))
    return one(nodes, {"x": shape}, ["y", *(["z"] if shared else [])], dtype, weights)


@pytest.mark.parametrize(("dtype", "shape", "silu"), [
    *(("fp32", (2, 16, 6, 5), silu) for silu in ("none", "silu", "other")), ("fp16", (2, 16, 6, 5), "silu"),
    ("fp16", (2, 12, 6, 5), "none"), ("fp32", (1, 16, 7), "silu"), ("fp32", (2, 8, 34, 32), "silu"),
    ("fp16", (1, 16, 34, 32), "silu")], ids=str)
def test_group_norm_becomes_one_plugin_node_or_two(dtype: str, shape: tuple[int, ...], silu: str) -> None:
    new = compare(norm_model(dtype, shape, silu), {"x": shape}, dtype, "norm", {"ours": 1, "vendor": 0})
    ops = Counter(node.op_type for node in new.graph.node)
    whole = math.prod(shape[2:]) < 1000
    assert (ops["group_norm"], ops["group_norm_statistics"], ops["group_norm_normalise"]) == (
        (1, 0, 0) if whole else (0, 1, 1))
    assert ops["GroupNormalization"] == 0 and ops["Sigmoid"] == (silu == "other")


def test_a_group_norm_that_something_else_reads_keeps_its_silu() -> None:
    new = compare(norm_model("fp32", (2, 16, 6, 5), "silu", shared=True), {"x": (2, 16, 6, 5)}, "fp32", "norm",
                  {"ours": 1, "vendor": 0})
    assert Counter(node.op_type for node in new.graph.node)["Sigmoid"] == 1


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_whole_unet(tmp_path: Path, dtype: str) -> None:
    """Attention over three-dimensional inputs, group norm with SiLU, weights in files of their own."""
    bundle = small_bundle(tmp_path / "small", dtype)
    shapes = {"sample": (2, 4, 8, 8), "timestep": (2,), "encoder_hidden_states": (2, 7, 32)}
    kinds = ["attention", "norm"]
    none = {"attention": {"ours": 0, "vendor": 1}, "norm": {"ours": 1, "vendor": 0}}  # its head dim is 8
    model, counts = rewritten(bundle.path / "unet.onnx", shapes, kinds, ARCH)
    assert counts == none
    (bundle.path / "new.onnx").write_bytes(model)
    assert len(model) < 20_000  # the weights stay where they are
    rng = np.random.default_rng(0)
    feed = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    got, = ReferenceEvaluator(str(bundle.path / "new.onnx"), new_ops=OPERATORS).run(None, feed)
    wanted, = ReferenceEvaluator(str(bundle.path / "unet.onnx")).run(None, feed)
    assert np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted ** 2)) < ENGINE_REL_RMS[dtype]


def test_every_site_of_what_is_exported(bundles: dict[str, Path]) -> None:
    """By operator and pattern: as many sites as the manifest counts, and in a UNet all become plugin nodes."""
    bundle = Bundle.open(bundles["shapes"])
    for name in ("unet", "vae_decoder", "text_encoder"):
        component = bundle.component(name)
        config = bundle.config(name, backend="tensorrt", device="cuda:0", size=(64, 64), batch=2)
        shapes = {s.name: tuple(map(int, s.resolve(config.dims).shape)) for s in component.inputs}
        model = ir.load(bundle.path / component.file)
        before = sum(node.op_type == "Transpose" for node in model.graph)
        counts = rewrite(model, shapes, ["attention", "norm"], ARCH)
        for kind, op in (("attention", "Attention"), ("norm", "GroupNormalization")):
            assert sum(counts[kind].values()) == component.sites.get(op, 0), (name, kind)
            assert name == "text_encoder" or counts[kind]["vendor"] == 0  # that one has a mask
        if name == "unet":
            after = sum(node.op_type == "Transpose" for node in model.graph)
            assert before - after == 4 * counts["attention"]["ours"]


SITES = {  # name, shapes of the inputs, what is said of the site
    "attention": ("attention", [(2, 256, 8, 40), (2, 77, 8, 40), (2, 77, 8, 40)], {"scale": 0.5, "causal": False}),
    "wide": ("attention", [(1, 64, 1, 512)] * 3, {"scale": None, "causal": False}),
    "whole": ("group_norm", [(2, 320, 8, 8), (320,), (320,)],
              {"groups": 32, "eps": 1e-5, "silu": True, "channels_last": True, "affine": "fp16"}),
}


def test_the_code_of_a_node_takes_inputs_and_outputs_alone(tmp_path: Path) -> None:
    """Compiled for GPUs that are not here, in a process without the interpreter, and assembled by ptxas."""
    code = f"""
import json, re
from engines.tensorrt import plugins
from kernels.aot.assemble import assemble
from kernels.aot.artefact import KernelError
from kernels.aot import specialise as sites
from kernels.aot.artefact import SCRATCH, Artefact, KernelError
from kernels.aot.specialise import Tensor
for key, (name, shapes, site) in {SITES!r}.items():
    for arch, limit in ((75, None), (90, None), (90, 49152)):
        tensors = [Tensor(tuple(s), "fp16") for s in shapes]
        try:
            made = plugins.code(name, tensors, json.dumps(site), arch, limit)
        except KernelError as e:
            print(json.dumps([key, arch, limit, str(e)]))
            continue
        text = made.ptx.decode()
        entry = re.search(r"[.]entry " + made.entry + r"[(](.*?)[)]", text, re.DOTALL)[1]
        print(json.dumps([key, arch, limit, [len(re.findall("[.]u64", entry)), entry.count(",") + 1, made.grid,
                          made.block, made.shared, len(assemble(text, arch)) > 1000, ".loc" in text]]))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    found = {(key, arch, limit): rest for key, arch, limit, rest in map(json.loads, done.stdout.splitlines())}
    assert len(found) == 9
    for (key, arch, limit), rest in found.items():
        if (key, arch) == ("wide", 75):
            assert rest[4] <= 65536
        pointers, parameters, grid, block, shared, assembled, lines = rest
        assert (pointers, parameters) == (4, 4) and assembled and not lines
        assert grid == {"attention": [grid[0], 8, 2], "wide": [grid[0], 1, 1], "whole": [grid[0], 1, 2]}[key]
        assert grid[0] * block[0] > 0 and block[1:] == [1, 1]
        assert shared <= (limit or 232448)
    assert found["wide", 90, None][4] > 49152 >= found["wide", 90, 49152][4]


REGISTERED = """
import inspect, json
from types import SimpleNamespace
from engines.tensorrt import plugins

Desc, Combination = type("TensorDesc", (), {}), type("AutoTuneCombination", (), {})
Parameters, Integers = type("KernelLaunchParams", (), {}), type("SymIntExprs", (), {})
found = {}

class Vendor:
    TensorDesc = Desc
    AutoTuneCombination, KernelLaunchParams, SymIntExprs = Combination, Parameters, Integers
    register = lambda node: lambda f: found.setdefault(node, {}).setdefault("describe", f)
    autotune = lambda node: lambda f: found[node].setdefault("tune", f)
    aot_impl = lambda node: lambda f: found[node].setdefault("implement", f)

half, single = SimpleNamespace(name="HALF"), SimpleNamespace(name="FLOAT")
trt = SimpleNamespace(DataType=SimpleNamespace(HALF=half, FLOAT=single), __version__="0")
Combination.__init__ = lambda self, *words: setattr(self, "words", words)
Parameters.__init__ = lambda self, *numbers: setattr(self, "numbers", numbers)
Integers.__init__ = lambda self, count: setattr(self, "count", count)
plugins.register(trt, Vendor, 90)
names = {node: {kind: list(inspect.signature(f).parameters) for kind, f in fs.items()} for node, fs in found.items()}
inputs = [SimpleNamespace(shape=s, dtype=half) for s in ((2, 256, 8, 40), (2, 77, 8, 40), (2, 77, 8, 40))]
site, outputs, attention = json.dumps({"scale": None, "causal": False}), [inputs[0]], found["latentrt::attention"]
entry, ptx, launch, integers = attention["implement"](*inputs, site, outputs, 0)
tuned = [combination.words for combination in attention["tune"](*inputs, site, outputs)]
print(json.dumps([names, tuned, entry in ptx.decode(), launch.numbers, integers.count]))
"""


def test_tensorrt_is_given_functions_of_the_signatures_that_it_checks() -> None:
    """Inputs, attributes, `outputs`, `tactic`, as `tensorrt.plugin._validate` has it; and no numbers for the kernel."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", REGISTERED], cwd=ROOT, env=environment, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    names, combinations, entered, launch, integers = json.loads(done.stdout)
    assert set(names) == {f"latentrt::{name}" for name in plugins.PLUGINS}
    for node, functions in names.items():
        inputs = [p.removesuffix("_ptr") for p in plugins.PLUGINS[node.removeprefix("latentrt::")].inputs]
        assert functions == {"describe": [*inputs, "site"], "tune": [*inputs, "site", "outputs"],
                             "implement": [*inputs, "site", "outputs", "tactic"]}
    assert combinations == [["FP16, FP16, FP16, FP16", "LINEAR, LINEAR, LINEAR, LINEAR"]]
    assert entered and launch[1:3] == [8, 2] and launch[3] % 32 == 0 and launch[4:6] == [1, 1] and integers == 0


def test_layouts_are_tensorrts_words() -> None:
    last, first = (json.dumps({"channels_last": value}) for value in (True, False))
    assert plugins.layouts("attention", "{}", "fp16") == "LINEAR, LINEAR, LINEAR, LINEAR"
    assert plugins.layouts("group_norm", last, "fp16") == "HWC8, LINEAR, LINEAR, HWC8"
    assert plugins.layouts("group_norm_statistics", last, "bf16") == "HWC8, LINEAR"
    assert plugins.layouts("group_norm_normalise", first, "fp32") == "LINEAR, LINEAR, LINEAR, LINEAR, LINEAR"


@pytest.mark.parametrize("change", ["", ",\n\t.param .u32 k_param_4"], ids=["read", "more"])
def test_code_that_reads_the_scratch_pointers_is_refused(change: str) -> None:
    ptx = ".entry k(\n\t.param .u64 k_param_0,\n\t.param .u64 k_param_1,\n\t.param .u64 k_param_2" + change + "\n)\n"
    artefact = Artefact("attention", "k", "sm_90", "k", (("x_ptr", "*fp16"), *SCRATCH), {}, (), (128, 1, 1), 0, 4, 2,
                        "3.6", "", {}, {})
    if not change:
        assert sites.without_scratch(ptx.encode(), artefact) == b".entry k(\n\t.param .u64 k_param_0\n)\n"
        ptx += "ld.param.u64 %rd1, [k_param_2];"
    with pytest.raises(KernelError, match=r"k: got PTX whose entry takes \d parameters"):
        sites.without_scratch(ptx.encode(), artefact)


def test_kernels_refuse_what_they_cannot_do() -> None:
    q = Tensor((1, 16, 2, 40), "fp16")
    short, strange, bf16 = Tensor((1, 16, 2, 8), "fp16"), Tensor(q.shape, "int8"), Tensor(q.shape, "bf16")
    for (a, b, c), message in (((short, short, short), "head dim: got 8"), ((q, q, short), "v: got shape"),
                               ((strange, strange, strange), "got dtype int8")):
        with pytest.raises(KernelError, match=message):
            sites.attention(a, b, c, ARCH)
    with pytest.raises(KernelError, match="got bf16 on sm_75, expected sm_80 or later"):
        sites.attention(bf16, bf16, bf16, 75)
    x, affine = Tensor((2, 30, 4, 4), "fp16"), Tensor((30,), "fp16")
    with pytest.raises(KernelError, match="groups: got 4, expected a divisor"):
        sites.group_norm(x, affine, affine, ARCH, groups=4, eps=1e-5, silu=False, channels_last=False)
