"""Engines: right, cached by everything they depend on, refused when damaged, and built whole or not at all."""

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import engines
from engines import __main__ as cli
from engines import store
from engines.bundle import Bundle
from engines.check import verify
from engines.onnx.initializers import initializers
from engines.spec import EngineConfig, EngineError
from engines.store import sources
from tests.tolerances import ENGINE_REL_RMS
from tests.tools.small import small_bundle

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

ROOT = Path(__file__).parents[3]
BACKENDS = [name for name in engines.BACKENDS if not engines.backend(name).on_gpu and name != "inductor"]
"""Backends whose engines are made in no time; tests/engines/inductor/ asks the same of the one that compiles C++."""
SHAPES = [pytest.param(64, 64, 1, id="64x64-1"), pytest.param(64, 96, 2, id="64x96-2")]


def has(dtype: str) -> bool:
    return dtype in engines.backend("openvino").dtypes()


CASES = [("onnxruntime", "fp32"), ("openvino", "fp32"),
         *(pytest.param("openvino", d, marks=pytest.mark.skipif(not has(d), reason=f"this CPU does not compute in {d}"))
           for d in ("bf16", "fp16"))]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    return {(dtype, external): small_bundle(root / f"{dtype}-{external}", dtype, external).path
            for dtype in ("fp32", "fp16", "bf16") for external in (True, False)}


@pytest.fixture
def bundle(originals, tmp_path):
    return Bundle.open(shutil.copytree(originals["fp32", True], tmp_path / "small"))


def config(bundle, backend="openvino", component="unet", size=(64, 64), batch=1, **rest):
    return bundle.config(component, backend=backend, size=size, batch=batch, **rest)


def rel_rms(got, expected):
    return np.sqrt(np.mean((got - expected) ** 2) / np.mean(np.square(expected)))


def weights(bundle, component="unet"):
    model = onnx.load(bundle.path / bundle.component(component).file)
    return {w.name: numpy_helper.to_array(w).astype(np.float64) for w in model.graph.initializer}


def unet(w, feed):
    """The small UNet in torch, float64."""
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
    buffers = {**verify.inputs(engine.inputs.values(), seed), **{n: s.empty() for n, s in engine.outputs.items()}}
    engine.bind(buffers)
    return buffers


@pytest.mark.parametrize(("height", "width", "batch"), SHAPES)
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_equals_torch(bundle, backend, dtype, height, width, batch):
    engine = store.load(bundle, "unet", config(bundle, backend, size=(height, width), batch=batch, dtype=dtype))
    feed = verify.inputs(engine.inputs.values(), 3)
    got = verify.run(engine, feed)["noise_pred"]
    assert got.shape == (batch, 4, height // 8, width // 8)
    assert rel_rms(got, unet(weights(bundle), feed)) < ENGINE_REL_RMS[dtype]


@pytest.mark.parametrize("external", [True, False], ids=["external", "inline"])
@pytest.mark.parametrize("graph", ["fp16", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_16_bit_graphs_in_fp32_equal_torch(originals, tmp_path, backend, graph, external):
    bundle = Bundle.open(shutil.copytree(originals[graph, external], tmp_path / "small"))
    engine = store.load(bundle, "unet", config(bundle, backend, batch=2))
    feed = verify.inputs(engine.inputs.values(), 3)
    assert rel_rms(verify.run(engine, feed)["noise_pred"], unet(weights(bundle), feed)) < ENGINE_REL_RMS["fp32"]


def test_a_widened_graph_holds_no_second_copy_of_the_weights(originals, tmp_path):
    bundle = Bundle.open(shutil.copytree(originals["fp16", True], tmp_path / "small"))
    path = store.build(bundle, "text_encoder", config(bundle, "onnxruntime", "text_encoder"))
    assert (path / "widened.onnx").stat().st_size < 0.2 * (bundle.path / "text_encoder.onnx.data").stat().st_size


@pytest.mark.parametrize("component", ["text_encoder", "vae_decoder"])
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_other_components_equal_the_reference(bundle, component, backend, dtype):
    own = config(bundle, backend, component, size=(64, 96), batch=2, dtype=dtype)
    engine = store.load(bundle, component, own)
    feed = verify.inputs(engine.inputs.values(), 5)
    expected = verify.reference(bundle, component, own, feed)
    for name, value in verify.run(engine, feed).items():
        assert rel_rms(value, expected[name]) < ENGINE_REL_RMS[dtype]


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_timesteps_are_never_rounded(bundle, backend, dtype):
    """bfloat16 has no 999, and half a step apart is another angle: the embedding stays in fp32."""
    engine = store.load(bundle, "unet", config(bundle, backend, dtype=dtype))
    buffers = bound(engine)
    errors = {}
    for timestep in (0.0, 801.0, 999.0, 998.5):
        buffers["timestep"][:] = timestep
        engine.enqueue()
        feed = {name: buffers[name] for name in engine.inputs}
        errors[timestep] = rel_rms(buffers["noise_pred"], unet(weights(bundle), feed))
    assert max(errors.values()) < 2 * errors[0.0] + 5e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_enqueue_reads_and_writes_the_bound_memory(bundle, backend):
    engine = store.load(bundle, "unet", config(bundle, backend))
    buffers = bound(engine)
    engine.enqueue()
    first = buffers["noise_pred"].copy()
    buffers["sample"][:] *= 0.5
    engine.enqueue()
    feed = {name: buffers[name] for name in engine.inputs}
    assert rel_rms(buffers["noise_pred"], unet(weights(bundle), feed)) < ENGINE_REL_RMS["fp32"]
    assert rel_rms(buffers["noise_pred"], first) > 1e-2
    buffers["sample"][:] *= 2
    engine.enqueue()
    np.testing.assert_array_equal(buffers["noise_pred"], first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "change", "message"), [
    ("sample", lambda a: a.astype(np.float64), r"bind sample: got float64 \[1, 4, 8, 8\], expected float32"),
    ("sample", lambda a: a[:, :, :4], r"got float32 \[1, 4, 4, 8\], expected float32 \[1, 4, 8, 8\]"),
    ("sample", lambda a: np.asfortranarray(a), "not C-contiguous"),
    ("noise_pred", lambda a: np.broadcast_to(np.float32(0), a.shape), "not C-contiguous or not writeable"),
    ("sample", lambda a: a.tolist(), "got list, expected a numpy array"),
    ("sample", lambda a: None, "got NoneType"),
], ids=["dtype", "shape", "fortran", "read-only", "list", "none"])
def test_bind_refuses(bundle, backend, name, change, message):
    engine = store.load(bundle, "unet", config(bundle, backend))
    buffers = bound(engine)
    with pytest.raises(EngineError, match=message):
        engine.bind({**buffers, name: change(buffers[name])})


@pytest.mark.parametrize("backend", BACKENDS)
def test_bind_wants_exactly_the_names(bundle, backend):
    engine = store.load(bundle, "unet", config(bundle, backend))
    with pytest.raises(EngineError, match="call bind first"):
        engine.enqueue()
    buffers = bound(engine)
    with pytest.raises(EngineError, match="expected exactly"):
        engine.bind({**buffers, "extra": buffers["sample"]})
    del buffers["timestep"]
    with pytest.raises(EngineError, match=r"expected exactly.*timestep"):
        engine.bind(buffers)


@pytest.mark.parametrize("external", [True, False], ids=["external", "inline"])
@pytest.mark.parametrize("graph", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_refit_changes_weights_and_back(originals, tmp_path, backend, graph, external):
    bundle = Bundle.open(shutil.copytree(originals[graph, external], tmp_path / "small"))
    engine = store.load(bundle, "unet", config(bundle, backend))
    buffers = bound(engine)
    feed = {name: buffers[name] for name in engine.inputs}
    engine.enqueue()
    before = buffers["noise_pred"].copy()
    old = weights(bundle)
    changed = {name: old[name] * 1.5 for name in ("conv_in.weight", "norm.weight", "query.weight", "conv_in.bias")}
    for names in (("conv_in.weight",), ("norm.weight", "query.weight", "conv_in.bias")):  # the first call's are kept
        engine.refit({name: changed[name].astype(np.float32) for name in names})
    engine.enqueue()
    narrow = {"fp32": np.float32, "fp16": np.float16, "bf16": None}[graph]
    rounded = {n: v.astype(narrow) if narrow else torch.from_numpy(v).bfloat16().double().numpy()
               for n, v in changed.items()}
    expected = unet({**old, **{n: v.astype(np.float64) for n, v in rounded.items()}}, feed)
    assert rel_rms(before, expected) > 1e-2
    assert rel_rms(buffers["noise_pred"], expected) < ENGINE_REL_RMS["fp32"]
    engine.refit({name: old[name].astype(np.float32) for name in changed})
    engine.enqueue()
    np.testing.assert_array_equal(buffers["noise_pred"], before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_refit_refuses_and_changes_nothing(bundle, backend):
    engine = store.load(bundle, "unet", config(bundle, backend))
    buffers = bound(engine)
    engine.enqueue()
    before = buffers["noise_pred"].copy()
    good = np.zeros(32, np.float32)
    for name, value, message in (("conv.weight", good, "unknown weights conv.weight"),
                                 ("norm.weight", good[1:], r"weight norm.weight: got shape \(31,\), expected \(32,\)"),
                                 ("norm.weight", good.astype(np.int32), "expected floating-point")):
        with pytest.raises(EngineError, match=message):
            engine.refit({"norm.bias": good, name: value})
    engine.enqueue()
    np.testing.assert_array_equal(buffers["noise_pred"], before)


@pytest.mark.parametrize("external", [True, False], ids=["external", "inline"])
def test_initializers_are_those_that_onnx_reads(originals, external):
    file = originals["bf16", external] / "unet.onnx"
    expected = {w.name: (w.data_type, tuple(w.dims), w.data_location == 1)
                for w in onnx.load(file, load_external_data=False).graph.initializer}
    assert {n: dataclasses.astuple(w) for n, w in initializers(file.read_bytes()).items()} == expected
    with pytest.raises(EngineError, match="not an ONNX model"):
        initializers(file.read_bytes()[:-5])


def test_a_hit_does_not_build(bundle):
    own = config(bundle)
    first = store.build(bundle, "unet", own)
    record = store.Record.read(first, "")
    assert store.build(bundle, "unet", own) == first
    store.load(bundle, "unet", own)
    assert store.Record.read(first, "") == record
    assert store.build(bundle, "unet", own, rebuild=True) == first
    assert store.Record.read(first, "").date > record.date
    assert os.listdir(bundle.path / "engines") == [first.name]


CHANGES = {"backend": "onnxruntime", "dtype": "bf16", "dims": {"batch": 2, "latent_height": 16},
           "device": "cpu:avx2", "threads": 1, "options": {"a": "b"}}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(EngineConfig)])
def test_every_config_field_changes_the_key(bundle, field):
    own = config(bundle)
    other = dataclasses.replace(own, **{field: CHANGES[field]})
    assert store.key(bundle, "unet", other)["config"] == {**own.to_json(), field: CHANGES[field]}
    assert store.directory_name(bundle, "unet", other) != store.directory_name(bundle, "unet", own)


@pytest.mark.parametrize("what", ["graph", "version", "cpu", "source", "dtype of the component"])
def test_everything_else_that_matters_changes_the_key(bundle, monkeypatch, what):
    own = config(bundle)
    path = store.build(bundle, "unet", own)
    module = engines.backend("openvino")
    if what in ("graph", "dtype of the component"):
        manifest = json.loads((bundle.path / "manifest.json").read_text())
        component = manifest["components"]["unet"]
        if what == "graph":
            component["files"]["unet.onnx"] = "0" * 64
        else:
            component["dtype"] = "bf16"
        (bundle.path / "manifest.json").write_text(json.dumps(manifest))
        bundle = Bundle.open(bundle.path)
    elif what == "source":
        change_sources(monkeypatch)
    else:
        name = "openvino" if what == "version" else "cpu"
        monkeypatch.setattr(module, "versions", lambda config, real=module.versions: {**real(config), name: "other"})
    assert store.find(bundle, "unet", own) is None
    reason = store.stale(bundle, store.Record.read(path, ""))
    assert reason and {"graph": "component.files.unet.onnx", "version": "versions.openvino", "cpu": "versions.cpu",
                       "source": "source.engines/openvino/backend.py",
                       "dtype of the component": "component.dtype"}[what] in reason


def change_sources(monkeypatch):
    """Make the backend's source files others than they are."""
    monkeypatch.setattr(sources, "hashes", lambda package, real=sources.hashes: dict.fromkeys(real(package), "changed"))


def pretend(monkeypatch, **versions):
    """Make today's OpenVINO or machine another one."""
    module = engines.backend("openvino")
    monkeypatch.setattr(module, "versions", lambda config=None, real=module.versions: {**real(config), **versions})


@pytest.mark.parametrize("what", ["openvino", "cpu", "driver"])
def test_an_engine_for_another_version_or_machine_is_refused_with_the_command(bundle, monkeypatch, what):
    own = config(bundle)
    old = store.build(bundle, "unet", own)
    pretend(monkeypatch, **{what: "other"})
    message = rf"{old.name} was built for another machine or version \(versions.{what}: .*" \
              r'→ "other"\); build it again: python -m engines build .* --rebuild'
    with pytest.raises(EngineError, match=message) as error:
        store.load(bundle, "unet", own)
    words = shlex.split(str(error.value).split("python -m engines ")[1])
    assert "--component" not in words and cli.main(words) == 0  # all components: the others are as old
    store.load(bundle, "unet", own)
    assert len(list(store.engine_directories(bundle))) == 1 + 4  # the old one is another machine's, perhaps


@pytest.mark.parametrize("what", ["source", "kernels"])
def test_an_engine_that_only_our_own_sources_left_behind_is_built_again(bundle, monkeypatch, what):
    own = config(bundle)
    store.build(bundle, "unet", own)
    if what == "source":
        change_sources(monkeypatch)
    else:
        pretend(monkeypatch, kernels="other")
    store.load(bundle, "unet", own)
    assert len(list(store.engine_directories(bundle))) == 2


def test_another_machine_s_engine_does_not_keep_this_one_from_its_own(bundle, monkeypatch):
    own = config(bundle)
    with monkeypatch.context() as there:
        pretend(there, cpu="other")
        store.build(bundle, "unet", own)
    store.build(bundle, "unet", own)
    store.load(bundle, "unet", own)
    change_sources(monkeypatch)
    store.load(bundle, "unet", own)
    store.load(bundle, "unet", config(bundle, batch=2))  # of another config there is none


def test_a_16_bit_engine_on_a_cpu_is_refused_by_onnxruntime(bundle):
    with pytest.raises(EngineError, match=r"got dtype fp16.*--dtype fp32"):
        store.build(bundle, "unet", config(bundle, "onnxruntime", dtype="fp16"))
    assert os.listdir(bundle.path / "engines") == []


def test_unusable_devices_and_options_are_refused(bundle):
    for backend, rest, message in (("onnxruntime", {"device": "cuda:0"}, "no CUDAExecutionProvider.*onnxruntime-gpu"),
                                   ("onnxruntime", {"device": "gpu"}, "got device 'gpu', expected cpu"),
                                   ("onnxruntime", {"options": {"x": 1}}, "unknown options"),
                                   ("openvino", {"device": "cuda:0"}, "got device"),
                                   ("openvino", {"options": {"SURPRISE": "1"}}, "SURPRISE"),
                                   ("openvino", {"options": {"x": object()}}, "JSON values only")):
        if backend == "onnxruntime" and "cuda:0" in engines.backend(backend).devices():
            continue
        with pytest.raises(EngineError, match=message):
            store.build(bundle, "unet", config(bundle, backend, **rest))
    with pytest.raises(EngineError, match="backend: got 'tensorflow', expected one of onnxruntime, openvino"):
        engines.backend("tensorflow")


def test_a_read_only_bundle_uses_the_cache_directory(bundle, tmp_path):
    code = textwrap.dedent(f"""
        import ctypes
        ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())  # root obeys modes too
        import engines
        from engines import store
        bundle = engines.Bundle.open({str(bundle.path)!r})
        own = bundle.config("vae_decoder", backend="onnxruntime", size=(64, 64), batch=1)
        print(store.build(bundle, "vae_decoder", own))
        store.load(bundle, "vae_decoder", own)
    """)
    bundle.path.chmod(0o555)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")})
    bundle.path.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "cache" / "latentrt")) and "is read-only" in done.stderr
    assert not (bundle.path / "engines").exists()


def test_a_damaged_engine_file_names_the_command(originals, tmp_path):
    bundle = Bundle.open(shutil.copytree(originals["fp16", True], tmp_path / "small"))
    own = config(bundle, "onnxruntime", batch=2)
    path = store.build(bundle, "unet", own)
    data = bytearray((path / "widened.onnx").read_bytes())
    data[100] ^= 1
    (path / "widened.onnx").write_bytes(data)
    with pytest.raises(EngineError, match=r"widened.onnx is damaged.*python -m engines build .* --rebuild") as error:
        store.load(bundle, "unet", own)
    command = str(error.value).split("python -m engines ")[1].split()
    assert cli.main(command) == 0
    store.load(bundle, "unet", own)
    (path / "widened.onnx").unlink()
    with pytest.raises(EngineError, match=r"widened.onnx is missing.*--rebuild"):
        store.load(bundle, "unet", own)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("built", [True, False], ids=["built", "not-built"])
def test_a_damaged_onnx_file_is_refused(bundle, backend, built):
    own = config(bundle, backend)
    if built:
        store.build(bundle, "unet", own)
    file = bundle.path / "unet.onnx.data"
    data = bytearray(file.read_bytes())
    data[5000] ^= 1
    file.write_bytes(data)
    with pytest.raises(EngineError, match=r"unet.onnx.data is damaged.*python -m export"):
        store.load(bundle, "unet", own)


@pytest.mark.parametrize(("change", "message"), [
    (lambda r: r.update(format=99), "got engine format 99, expected 3; build it again"),
    (lambda r: r.update(surprise=1), r"unknown keys \['surprise'\]"),
    (lambda r: r.pop("files"), r"missing keys \['files'\]"),
    (lambda r: r.pop("config"), "not a readable engine record"),
    (lambda r: r["config"].update(surprise=1), "unknown keys"),
], ids=["newer", "unknown", "missing", "no-config", "unknown-config"])
def test_a_damaged_record_names_the_command(bundle, change, message):
    own = config(bundle)
    path = store.build(bundle, "unet", own)
    record = json.loads((path / "engine.json").read_text())
    change(record)
    (path / "engine.json").write_text(json.dumps(record))
    with pytest.raises(EngineError, match=message):
        store.load(bundle, "unet", own)
    (path / "engine.json").write_text("{")
    with pytest.raises(EngineError, match=r"engine.json: not a readable.*engines build .*--rebuild"):
        store.load(bundle, "unet", own)


def scaled(bundle, factor):
    """A `load` of the OpenVINO backend whose engine is not what the graph says: the last weights are scaled."""
    real = engines.backend("openvino").load

    def load(*given):
        engine = real(*given)
        engine.refit({"conv_out.weight": (weights(bundle)["conv_out.weight"] * factor).astype(np.float32)})
        return engine
    return load


def test_an_engine_one_percent_off_is_not_published(bundle, monkeypatch):
    own = config(bundle)
    monkeypatch.setattr(engines.backend("openvino"), "load", scaled(bundle, 1.01))
    with pytest.raises(EngineError, match=r"openvino fp32 engine of unet: output noise_pred differs .* by 1.00e-02"):
        store.build(bundle, "unet", own)
    assert os.listdir(bundle.path / "engines") == []


def test_nan_is_not_published(bundle, monkeypatch):
    monkeypatch.setattr(engines.backend("openvino"), "load", scaled(bundle, np.nan))
    with pytest.raises(EngineError, match="noise_pred has NaN or Inf, the fp32 reference has none"):
        store.build(bundle, "unet", config(bundle))
    assert os.listdir(bundle.path / "engines") == []


def test_an_output_left_unwritten_is_noticed(bundle):
    engine = store.load(bundle, "unet", config(bundle))
    engine.enqueue = lambda stream=None: None
    feed = verify.inputs(engine.inputs.values(), 0)
    got = verify.run(engine, feed)
    with pytest.raises(EngineError, match="NaN"):
        verify.compare(got, {"noise_pred": unet(weights(bundle), feed)}, "fp32", "engine", 0)


def test_figures_are_recorded(bundle):
    check = store.Record.read(store.build(bundle, "unet", config(bundle)), "").check
    assert check.reference == "onnxruntime fp32 on cpu" and 0 < check.rel_rms < ENGINE_REL_RMS["fp32"] and check.max_abs
    own = config(bundle, "onnxruntime")
    assert store.Record.read(store.build(bundle, "unet", own), "").check.reference == verify.ITSELF
    skipped = store.build(bundle, "vae_decoder", config(bundle, component="vae_decoder"), check=False)
    assert store.Record.read(skipped, "").check is None


def test_tolerances_are_those_of_the_tests():
    assert verify.TOLERANCE == ENGINE_REL_RMS


def builder(bundle, own) -> subprocess.Popen[str]:
    """A process that is in the middle of building `own`: it says so and waits for a line."""
    code = textwrap.dedent(f"""
        import sys
        import engines
        module = engines.backend({own.backend!r})
        def build(target, directory, real=module.build):
            (directory / "half").write_text("half")
            print("in", flush=True)
            sys.stdin.readline()
            (directory / "half").unlink()
            real(target, directory)
        module.build = build
        from engines import store
        bundle = engines.Bundle.open({str(bundle.path)!r})
        store.build(bundle, "unet", engines.EngineConfig.from_json({own.to_json()!r}))
    """)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True)
    assert process.stdout and process.stdout.readline() == "in\n"
    return process


def test_a_second_builder_waits_for_the_first(bundle, caplog):
    own = config(bundle)
    first = builder(bundle, own)
    code = f"import engines; from engines import store; b = engines.Bundle.open({str(bundle.path)!r}); " \
           f"print(store.build(b, 'unet', " \
           f"engines.EngineConfig.from_json({own.to_json()!r})))"
    second = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True)
    assert "waiting for another process that is building" in second.stderr.readline()
    assert second.poll() is None
    first.communicate("go on\n", timeout=60)
    assert first.returncode == 0
    path = store.find(bundle, "unet", own)
    record = store.Record.read(path, "")
    out, _ = second.communicate(timeout=60)
    assert second.returncode == 0 and Path(out.strip()) == path
    assert store.Record.read(path, "") == record


def test_a_killed_build_leaves_nothing_and_the_next_works(bundle):
    own = config(bundle)
    first = builder(bundle, own)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    assert store.find(bundle, "unet", own) is None
    assert list(store.engine_directories(bundle)) == []
    engine = store.load(bundle, "unet", own)
    bound(engine)
    engine.enqueue()
    assert [p.name for p in (bundle.path / "engines").iterdir()] == [store.find(bundle, "unet", own).name]


def test_ctrl_c_in_a_build_leaves_nothing(bundle):
    first = builder(bundle, config(bundle))
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=60)
    assert first.returncode != 0
    assert os.listdir(bundle.path / "engines") == []


def run(capsys, *words):
    status = cli.main([str(w) for w in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_build_list_inspect_verify(bundle, capsys):
    status, out, _ = run(capsys, "build", bundle.path, "--backend", "openvino", "--size", "64x64", "64x96",
                         "--batch", 2)
    assert status == 0
    shapes = sorted(line[line.index("  "):].split("fp32")[0].strip() for line in out.splitlines()[1:])
    assert shapes == sorted(["2 rows", "2 rows 8x8 latents", "4 rows 8x8 latents", "2 rows 8x12 latents",
                             "4 rows 8x12 latents", "1 row 64x64", "1 row 64x96"])
    status, out, _ = run(capsys, "list", bundle.path, "--json")
    listed = json.loads(out)
    assert status == 0 and [b["name"] for b in listed["backends"]] == list(engines.BACKENDS)
    assert len(listed["engines"]) == 7 and {e["state"] for e in listed["engines"]} == {"ok"}
    status, out, _ = run(capsys, "inspect", bundle.path)
    assert status == 0 and "noise_pred[batch, 4, latent_height, latent_width]" in out and "1 Attention" in out
    assert f"tasks: {', '.join(bundle.manifest.tasks)}" in out
    status, out, _ = run(capsys, "verify", bundle.path)
    assert status == 0 and out.count("ok") == 8
    (bundle.path / "unet.onnx.data").write_bytes(b"damaged")
    status, out, _ = run(capsys, "verify", bundle.path)
    assert status == 1 and "damaged" in out


def test_list_shows_stale_and_damaged_engines(bundle, capsys, monkeypatch):
    path = store.build(bundle, "unet", config(bundle))
    module = engines.backend("openvino")
    with monkeypatch.context() as patch:
        patch.setattr(module, "versions", lambda c=None, real=module.versions: {**real(c), "openvino": "9"})
        assert 'stale: versions.openvino: ' in run(capsys, "list", bundle.path)[1]
        assert run(capsys, "verify", bundle.path)[0] == 0
    with monkeypatch.context() as patch:
        patch.delitem(engines.BACKENDS, "openvino")
        assert "unusable here: backend: got 'openvino'" in run(capsys, "list", bundle.path)[1]
    (path / "engine.json").write_text("[]")
    assert "damaged: " in run(capsys, "list", bundle.path)[1]
    status, out, _ = run(capsys, "verify", bundle.path)
    assert status == 1 and "engines build" in out


@pytest.mark.parametrize(("words", "message"), [
    (["build", "BUNDLE", "--backend", "openvino", "--size", "64x60"], "got 64x60.* multiples of 8 pixels .*try 64x64"),
    (["build", "BUNDLE", "--backend", "openvino", "--component", "unett"], "got component 'unett'"),
    (["build", "BUNDLE", "--backend", "openvino", "--option", "x"], "expected NAME=VALUE"),
    (["inspect", "/nowhere"], "expected a bundle"),
])
def test_errors_are_one_line_and_status_2(bundle, capsys, words, message):
    status, _, err = run(capsys, *[bundle.path if w == "BUNDLE" else w for w in words])
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(err)


def test_ctrl_c_at_the_command_line_is_130(bundle):
    code = "import sys, engines, engines.__main__ as cli; module = engines.backend('openvino')\n" \
           "def build(*a): print('in', flush=True); sys.stdin.readline()\n" \
           f"module.build = build; sys.exit(cli.main(['build', {str(bundle.path)!r}, '--backend', 'openvino']))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert os.listdir(bundle.path / "engines") == []


def test_loading_and_running_imports_nothing_heavy(bundle):
    for backend in BACKENDS:
        store.build(bundle, "unet", config(bundle, backend))
    code = textwrap.dedent(f"""
        import sys
        import engines
        light = {{"onnxruntime", "openvino", "tqdm"}} & set(sys.modules)
        assert not light, light
        from engines import store
        bundle = engines.Bundle.open({str(bundle.path)!r})
        for backend in {BACKENDS!r}:
            engine = store.load(bundle, "unet", bundle.config("unet", backend=backend, size=(64, 64), batch=1))
            engine.refit({{"norm.bias": engine.inputs["timestep"].empty().repeat(32) * 0}})
        heavy = {{"torch", "onnx", "onnx_ir", "onnxscript", "diffusers", "transformers"}} & set(sys.modules)
        assert not heavy, heavy
    """)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_import_is_quick():
    code = "import numpy, time; t = time.perf_counter(); import engines; print(time.perf_counter() - t)"
    best = min(float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                                    check=True).stdout) for _ in range(3))
    assert best < 0.5
