"""TensorRT-RTX as it is on a machine without a GPU: it builds, says what it cannot do, and keeps nothing half-built.

What needs a GPU is marked so, for both flavours.
"""

import ast
import contextlib
import dataclasses
import json
import operator
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

import engines
from engines import __main__ as cli
from engines import store
from engines.bundle import Bundle
from engines.check import compare
from engines.check.tolerance import TOLERANCE
from engines.machine.buffers import device_address
from engines.machine.gpu import Memory
from engines.spec import EngineConfig, EngineError
from engines.store.choose import choose
from engines.tensorrt import choice as tensorrt_choice
from engines.tensorrt.backend import ENTERPRISE, RTX, Options
from engines.tensorrt.build import ABOUT, PLAN, Request, _parse, logger, write_whole
from export.__main__ import main as export_main
from models import tiny
from tests.conftest import why_no_gpu
from tests.tools.small import small_bundle

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.skipif(RTX.available() is not None, reason=str(RTX.available()))
without_gpu = pytest.mark.skipif(why_no_gpu() is None, reason="is about a machine without an NVIDIA GPU")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    return {dtype: small_bundle(root / dtype, dtype).path for dtype in ("fp32", "fp16", "bf16")}


@pytest.fixture
def bundle(originals, tmp_path):
    return Bundle.open(shutil.copytree(originals["fp32"], tmp_path / "small"))


@pytest.fixture
def sd1(bundles, tmp_path):
    """A copy whose denoiser takes some seconds to build."""
    return Bundle.open(shutil.copytree(bundles["sd1"], tmp_path / "sd1", ignore=shutil.ignore_patterns("engines")))


def config(bundle, component="unet", **rest):
    values = {"backend": "tensorrt-rtx", "device": "sm_89", "size": (64, 64), "batch": 2,
              "dtype": bundle.component(component).dtype}
    return bundle.config(component, **{**values, **rest})


@pytest.mark.parametrize("component", ["unet", "vae_decoder"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_builds_every_precision_for_a_gpu_that_is_not_here(originals, tmp_path, dtype, component):
    bundle = Bundle.open(shutil.copytree(originals[dtype], tmp_path / "small"))
    path = store.build(bundle, component, config(bundle, component), check=False)
    about = json.loads((path / ABOUT).read_text())
    assert about["arch"] == "sm_89" and about["library"] == {"tensorrt-rtx": RTX.vendor().__version__}
    assert about["attentions"] == bundle.component(component).sites.get("Attention", 0)
    assert about["plan_bytes"] == (path / PLAN).stat().st_size and about["memory"]["weights"] > 0
    assert about["build_peak_bytes"] > about["plan_bytes"] and about["layers"] > about["attentions"]


@pytest.mark.parametrize("component", ["text_encoder", "vae_decoder", "vae_encoder"])
def test_builds_what_is_exported(sd1, component):
    """The text encoder has int64 tokens and causal attention, which no fused fp32 kernel exists for."""
    path = store.build(sd1, component, config(sd1, component), check=False)
    assert json.loads((path / ABOUT).read_text())["attentions"] == sd1.component(component).sites["Attention"]


def test_the_shape_is_in_the_plan_and_the_same_build_gives_the_same_plan(bundle):
    paths = [store.build(bundle, "vae_decoder", config(bundle, "vae_decoder", size=(64, width))) for width in (64, 96)]
    assert len({(path / PLAN).read_bytes() for path in paths}) == 2
    first = (paths[0] / PLAN).read_bytes()
    store.build(bundle, "vae_decoder", config(bundle, "vae_decoder"), rebuild=True)
    assert (paths[0] / PLAN).read_bytes() == first


@without_gpu
def test_an_engine_that_cannot_run_here_is_built_unchecked_and_says_so(bundle, caplog, capsys):
    path = store.build(bundle, "unet", config(bundle))
    assert store.Record.read(path, "").check is None
    assert "unet: built, not checked: got no NVIDIA GPU here, expected sm_89" in caplog.text
    with pytest.raises(EngineError, match=r"does not run on this machine: got no NVIDIA GPU here, expected sm_89"):
        store.load(bundle, "unet", config(bundle))
    assert cli.main(["verify", str(bundle.path)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if path.name in line)
    assert "not checked: got no NVIDIA GPU" in line and "ok" not in line
    assert cli.main(["verify", str(bundle.path), "--backend", "tensorrt"]) == 0
    assert path.name not in capsys.readouterr().out
    assert cli.main(["inspect", str(bundle.path)]) == 0
    assert "not checked" in capsys.readouterr().out
    (path / PLAN).write_bytes(b"damaged")
    assert cli.main(["verify", str(bundle.path)]) == 1
    assert f"{PLAN} is damaged" in capsys.readouterr().out


@without_gpu
def test_the_library_opens_no_plan_without_a_gpu(bundle):
    """Not even one that was built for another machine's: its runtime starts with a CUDA stream."""
    path = store.build(bundle, "vae_decoder", config(bundle, "vae_decoder"))
    trt = RTX.vendor()
    log = logger(trt)
    log.why()
    assert trt.Runtime(log).deserialize_cuda_engine((path / PLAN).read_bytes()) is None
    assert "Cuda Runtime" in log.why()


@without_gpu
def test_auto_is_a_backend_that_runs_here():
    assert choose()[0] in ("openvino", "onnxruntime")
    assert choose("tensorrt-rtx", "fp16")[:3] == ("tensorrt-rtx", "fp16", "cuda:0")


@without_gpu
@pytest.mark.parametrize("options", [{"refit": "true"}, {"stripped": True}, {"refit": True, "stripped": True}], ids=str)
def test_weights_that_can_change_need_the_gpu_at_build_time(bundle, options):
    with pytest.raises(EngineError, match=r"could not build .*unet.onnx for sm_89: .*needs a GPU while it is built"):
        store.build(bundle, "unet", config(bundle, options=options))
    assert os.listdir(bundle.path / "engines") == []


def test_options_become_builder_flags():
    flags = RTX.vendor().BuilderFlag
    for options, expected in (({}, ()), ({"refit": "true"}, ("REFIT",)), ({"refit": False, "workspace": "64"}, ()),
                              ({"stripped": "true"}, ("REFIT_IDENTICAL", "STRIP_PLAN")),
                              ({"stripped": True, "refit": "True"}, ("REFIT", "STRIP_PLAN"))):
        assert Options.read(options).flags == expected
        assert all(hasattr(flags, name) for name in expected)
    assert Options.read({"optimization_level": "0", "workspace": 1024}) == Options(False, False, 0, 1024)


@pytest.mark.parametrize(("rest", "message"), [
    ({"options": {"fp16": "true"}}, "got option 'fp16', expected one of attention, norm, refit, stripped, opt"),
    ({"options": {"refit": "yes"}}, "option refit: got 'yes', expected true or false"),
    ({"options": {"optimization_level": 6}}, "option optimization_level: got 6, expected 0 to 5"),
    ({"options": {"workspace": "0"}}, "option workspace: got '0', expected MiB, at least 1"),
    ({"device": "cpu"}, "got device 'cpu', expected cuda:N or an architecture such as sm_89; pass --device"),
    ({"device": "sm_90"}, "got sm_90, expected one of sm_75, .*sm_120.*; use --backend tensorrt on that GPU"),
    ({"device": "cuda:99"}, r"got device cuda:99 on a machine of \d+ NVIDIA GPUs"),
    ({"dtype": "fp16"}, "got dtype fp16, expected fp32, that of the graph; pass --dtype fp32, or export"),
    ({"device": "sm_75"}, "could not build .*unet.onnx for sm_75: .*Turing .*FP32 GEMM is not supported"),
], ids=["unknown", "bool", "level", "workspace", "cpu", "hopper", "number", "dtype", "turing"])
def test_what_it_cannot_build_is_refused(bundle, rest, message):
    with pytest.raises(EngineError, match=message):
        store.build(bundle, "unet", config(bundle, **rest))
    assert list(store.engine_directories(bundle)) == []


def build_graph(path, bundle, nodes, inputs=("sample",), outputs=("noise_pred",)):
    """Build a graph of `nodes` in place of the bundle's UNet."""
    component = bundle.component("unet")
    component = dataclasses.replace(component, inputs=tuple(s for s in component.inputs if s.name in inputs))
    shape = ["batch", 4, "latent_height", "latent_width"]
    values = [[helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in names]
              for names in (inputs, outputs)]
    model = helper.make_model(helper.make_graph(nodes, "graph", *values), opset_imports=[helper.make_opsetid("", 23)],
                              ir_version=11)
    onnx.save(model, path / "other.onnx")
    RTX.build(path / "other.onnx", component, config(bundle), path)


def test_a_graph_it_cannot_read_names_file_and_node(bundle, tmp_path):
    nodes = [helper.make_node("Relu", ["sample"], ["x"]), helper.make_node("Det", ["x"], ["noise_pred"], "the_det")]
    with pytest.raises(EngineError, match=r"cannot read .*other.onnx: node 1 'the_det' \(Det\): UNSUPPORTED_NODE"):
        build_graph(tmp_path, bundle, nodes)
    (tmp_path / "other.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"cannot read .*other.onnx: MODEL_DESERIALIZE_FAILED"):
        RTX.build(tmp_path / "other.onnx", bundle.component("unet"), config(bundle), tmp_path)
    assert not (tmp_path / PLAN).exists()


def test_a_graph_in_memory_finds_its_weights_beside_the_file(bundle):
    """So that a graph with plugin nodes need not be written, nor its weights copied."""
    own = config(bundle)
    shapes = [{s.name: tuple(map(int, s.resolve(own.dims).shape)) for s in specs}
              for specs in (bundle.component("unet").inputs, bundle.component("unet").outputs)]
    file = bundle.path / "unet.onnx"
    trt = RTX.vendor()
    request = Request("tensorrt-rtx", str(file), *shapes, "", "sm_89", None, False, (), None, None, "")
    builder = trt.Builder(logger(trt))
    counts = [_parse(trt, logger(trt), builder, request, model).num_layers for model in (None, file.read_bytes())]
    assert counts[0] == counts[1] > 0
    os.remove(bundle.path / "unet.onnx.data")
    with pytest.raises(EngineError, match=r"cannot read .*unet.onnx"):
        _parse(trt, logger(trt), builder, request, file.read_bytes())


@without_gpu
def test_a_build_with_plugins_that_fails_leaves_the_other(bundle, tmp_path, monkeypatch):
    """TensorRT-RTX has none, which shows after the kernel of the site has been compiled."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    own = config(bundle)
    shapes = [{s.name: tuple(map(int, s.resolve(own.dims).shape)) for s in specs}
              for specs in (bundle.component("unet").inputs, bundle.component("unet").outputs)]
    request = Request("tensorrt-rtx", str(bundle.path / "unet.onnx"), *shapes, str(tmp_path), "sm_89", None, False, (),
                      None, None, "")
    tensorrt_choice.build(request, {"norm": "auto", "attention": "native"})
    about = RTX.details(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [PLAN, ABOUT]
    assert about["kernels"] == {"attention": {"asked": "native", "used": "native"},
                                "norm": {"asked": "auto", "used": "native"}}
    assert list(about["failed"]) == ["norm"] and "got no plugins in Python" in about["failed"]["norm"]
    assert about["timings"] == []


def test_names_of_tensorrt_are_those_of_the_library():
    """Every `trt.Name.NAME` in the source is in a library of TensorRT 11's interface: nothing removed is used."""
    trt, found = RTX.vendor(), set()
    for file in sorted((ROOT / "engines").glob("tensorrt*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf8"))):
            if isinstance(node, ast.Attribute):
                found |= {*re.findall(r"^(?:self\._)?trt\.([\w.]+)$", ast.unparse(node))}
    assert {"ILogger.__init__", "TensorIOMode.OUTPUT", "ExecutionContextAllocationStrategy.USER_MANAGED"} <= found
    for name in found:
        assert operator.attrgetter(name)(trt) is not None, name


def test_a_graph_that_is_not_what_the_manifest_says_is_refused(bundle, tmp_path):
    with pytest.raises(EngineError, match=r"graph outputs of .*got \{'other': \(2, 4, 8, 8\)\}, expected \{'noise"):
        build_graph(tmp_path, bundle, [helper.make_node("Relu", ["sample"], ["other"])], outputs=["other"])


def test_a_crash_of_the_library_is_an_error(bundle):
    """One tensor as query, key and value ends TensorRT-RTX 1.7.1 with a segmentation fault."""
    with pytest.raises(EngineError, match=r"could not build .*text_encoder.onnx: the process died \(SIGSEGV\)"):
        store.build(bundle, "text_encoder", config(bundle, "text_encoder"))
    assert os.listdir(bundle.path / "engines") == []


def test_the_timing_cache_is_written_whole(tmp_path):
    write_whole(tmp_path / "deep" / "cache", memoryview(b"one"))
    write_whole(tmp_path / "deep" / "cache", memoryview(b"two"))
    assert (tmp_path / "deep" / "cache").read_bytes() == b"two" and len(os.listdir(tmp_path / "deep")) == 1


CHANGES = {"backend": "openvino", "dtype": "bf16", "dims": {"batch": 3},
           "device": "sm_86", "threads": 1, "options": {"workspace": "64"}}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(EngineConfig)])
def test_every_config_field_changes_the_key(bundle, field):
    own = config(bundle)
    other = dataclasses.replace(own, **{field: CHANGES[field]})
    assert store.directory_name(bundle, "unet", other) != store.directory_name(bundle, "unet", own)


def test_another_version_of_the_library_makes_an_engine_stale(bundle, monkeypatch):
    record = store.Record.read(store.build(bundle, "vae_decoder", config(bundle, "vae_decoder")), "")
    assert record.key["versions"] == {"tensorrt-rtx": RTX.vendor().__version__, "arch": "sm_89"}
    monkeypatch.setattr(RTX.vendor(), "__version__", "9.9")
    assert "versions.tensorrt-rtx" in (store.stale(bundle, record) or "")


@pytest.mark.parametrize(("flavour", "module"), [(RTX, "tensorrt_rtx_bindings"), (ENTERPRISE, "tensorrt")],
                         ids=["tensorrt-rtx", "tensorrt"])
def test_a_missing_package_names_the_pip_line(flavour, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert flavour.available() == f"backend {flavour.name}: the package is missing; run: {flavour.pip}"


@without_gpu
def test_tensorrt_itself_needs_its_gpu(bundle):
    assert ENTERPRISE.available() is not None
    with pytest.raises(EngineError, match=r"backend tensorrt: |got device cuda:0 on a machine of 0"):
        store.build(bundle, "unet", config(bundle, backend="tensorrt", device="cuda:0"))


class DeviceArray:
    def __init__(self, typestr="<f4", shape=(2, 4, 8, 8), strides=None, readonly=False):
        self.__cuda_array_interface__ = {"typestr": typestr, "shape": shape, "strides": strides,
                                         "data": (4096, readonly), "version": 3}


@dataclasses.dataclass
class DeviceBuffer:
    handle: int
    size: int


def test_addresses_of_device_memory(bundle):
    spec = bundle.component("unet").inputs[0].resolve(config(bundle).dims)
    assert [device_address(spec, b) for b in (4096, DeviceArray(), DeviceBuffer(4096, 2048))] == [4096] * 3
    for wrong in (DeviceArray("<f2"), DeviceArray(shape=(1, 4, 8, 8)), DeviceArray(strides=(4,)),
                  DeviceArray(readonly=True), DeviceBuffer(4096, 2047), np.zeros((2, 4, 8, 8), np.float32), None):
        with pytest.raises(EngineError, match=r"bind sample: got .*, expected"):
            device_address(spec, wrong)


def command(bundle, **popen):
    """`python -m engines build` of the UNet, and the process that builds in it."""
    words = [sys.executable, "-m", "engines", "build", str(bundle.path), "--backend", "tensorrt-rtx",
             "--device", "sm_89", "--component", "unet"]
    process = subprocess.Popen(words, cwd=ROOT, **popen)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_for(lambda: list((bundle.path / "engines").glob(".unet-*.tmp")) and children.read_text())
    return process, int(children.read_text().split()[0])


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def gone(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    return True


def test_ctrl_c_shows_how_far_it_was_and_stops_at_once(sd1):
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    process, builder = command(sd1, stderr=terminal)
    os.close(terminal)
    shown = b""
    while b"Determining refit engines" not in shown:  # for most of the time nobody is asked whether to go on
        shown += os.read(screen, 4096)
    assert b"%|" in shown
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    assert process.wait(timeout=20) == 130
    assert time.monotonic() - start < 1.5
    wait_for(lambda: gone(builder))
    os.close(screen)
    assert os.listdir(sd1.path / "engines") == []


def test_a_killed_build_leaves_no_engine_and_no_builder(sd1):
    process, builder = command(sd1)
    process.kill()
    process.wait()
    wait_for(lambda: gone(builder), seconds=1.5)
    assert list(store.engine_directories(sd1)) == []
    path = store.build(sd1, "unet", config(sd1, batch=1))
    assert os.listdir(sd1.path / "engines") == [path.name]


def test_export_refuses_a_gpu_before_it_begins(tmp_path, capsys):
    words = [str(tmp_path / "no checkpoint"), "-o", str(tmp_path / "bundle"), "--backend", "tensorrt-rtx"]
    assert export_main([*words, "--gpu", "sm_90"]) == 2
    assert "got sm_90, expected one of" in capsys.readouterr().err


@pytest.mark.slow
def test_export_builds_for_the_gpu_that_it_names(tmp_path):
    checkpoint = tiny.sd1(tmp_path / "checkpoint", levels=2)
    assert export_main([str(checkpoint), "-o", str(tmp_path / "bundle"), "--backend", "tensorrt-rtx", "--quiet",
                        "--gpu", "sm_89"]) == 0
    bundle = Bundle.open(tmp_path / "bundle")
    records = [store.Record.read(path, "") for path in store.engine_directories(bundle)]
    assert {r.component for r in records} == set(store.used(bundle, "tensorrt-rtx"))
    assert {(r.config.backend, r.config.device, r.config.dtype) for r in records} == {("tensorrt-rtx", "sm_89", "fp16")}


def for_this_gpu(name):
    backend = engines.backend(name)
    if reason := backend.available():
        pytest.skip(reason)
    try:
        backend.versions(EngineConfig(name, device="cuda:0"))
    except EngineError as e:
        pytest.skip(str(e))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_equals_the_reference(originals, tmp_path, name, dtype):
    for_this_gpu(name)
    bundle = Bundle.open(shutil.copytree(originals[dtype], tmp_path / "small"))
    path = store.build(bundle, "unet", config(bundle, backend=name, device="cuda:0"))
    check = store.Record.read(path, "").check
    assert check is not None and 0 < check.rel_rms < TOLERANCE[dtype]
    assert json.loads((path / ABOUT).read_text())["device_memory_bytes"] >= 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_refit_changes_weights_and_back(bundle, name):
    for_this_gpu(name)
    engine = store.load(bundle, "unet", config(bundle, backend=name, device="cuda:0", options={"refit": "true"}))
    feed = compare.inputs(engine.inputs.values(), 3)
    before = compare.run(engine, feed)["noise_pred"]
    old = onnx.numpy_helper.to_array(next(
        w for w in onnx.load(bundle.path / "unet.onnx").graph.initializer if w.name == "conv_out.weight"))
    engine.refit({"conv_out.weight": 2 * old})
    np.testing.assert_allclose(compare.run(engine, feed)["noise_pred"], 2 * before, rtol=1e-3, atol=1e-4)
    engine.refit({"conv_out.weight": old})
    np.testing.assert_allclose(compare.run(engine, feed)["noise_pred"], before, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["attention", "norm"])
def test_our_kernels_as_plugins_equal_the_reference(bundles, tmp_path, kind):
    for_this_gpu("tensorrt")
    bundle = Bundle.open(shutil.copytree(bundles["sd2"], tmp_path / "sd2", ignore=shutil.ignore_patterns("engines")))
    options = {"attention": "native", "norm": "native"} | {kind: "plugin"}
    path = store.build(bundle, "unet", config(bundle, backend="tensorrt", device="cuda:0", options=options))
    about = ENTERPRISE.details(path)
    assert about["kernels"][kind] == {"asked": "plugin", "used": "plugin"} and about["sites"][kind]["plugin"] > 0
    check = store.Record.read(path, "").check
    assert check is not None and check.rel_rms < TOLERANCE["fp32"]


@pytest.mark.gpu
def test_auto_times_every_build_and_says_what_is_inside(bundles, tmp_path):
    for_this_gpu("tensorrt")
    bundle = Bundle.open(shutil.copytree(bundles["sd2"], tmp_path / "sd2", ignore=shutil.ignore_patterns("engines")))
    path = store.build(bundle, "vae_decoder", config(bundle, "vae_decoder", backend="tensorrt", device="cuda:0"))
    about = ENTERPRISE.details(path)
    assert not about["failed"] and {len(t["plugins"]) for t in about["timings"]} >= {0, 1}
    best = min(about["timings"], key=lambda t: t["seconds"])
    assert {kind for kind, used in about["kernels"].items() if used["used"] == "plugin"} == set(best["plugins"])
    assert any(layer["kernel"] for layer in about["engine_layers"])
    assert sum(layer["milliseconds"] or 0 for layer in about["engine_layers"]) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_engines_share_a_workspace(bundle, name):
    for_this_gpu(name)
    opened = [store.load(bundle, part, config(bundle, part, backend=name, device="cuda:0"))
              for part in ("unet", "vae_decoder")]
    feeds = [compare.inputs(engine.inputs.values(), 3) for engine in opened]
    alone = [compare.run(engine, feed) for engine, feed in zip(opened, feeds, strict=True)]
    block = Memory(0, max(1, *(engine.workspace_bytes for engine in opened)))
    for engine in opened:
        engine.use_workspace(block)
    for _ in range(2):
        for engine, feed, expected in zip(opened, feeds, alone, strict=True):
            for output, value in compare.run(engine, feed).items():
                np.testing.assert_array_equal(value, expected[output])
    with pytest.raises(EngineError, match="workspace"):
        opened[0].use_workspace(block.handle + 1)
