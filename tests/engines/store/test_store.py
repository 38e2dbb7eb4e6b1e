"""The engine cache: refused when damaged or another machine's, and built whole or not at all."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import engines
from engines import __main__ as cli
from engines import store
from engines.bundle import Bundle
from engines.check import compare
from engines.spec import EngineError
from tests.engines.cases import BACKENDS, bound, config, unet, weights
from tests.engines.store.test_record import change_sources

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

ROOT = Path(__file__).parents[3]


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
    feed = compare.inputs(engine.inputs.values(), 0)
    got = compare.run(engine, feed)
    with pytest.raises(EngineError, match="NaN"):
        compare.arrays(got, {"noise_pred": unet(weights(bundle), feed)}, "fp32", "engine", 0)


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
