"""TensorRT-RTX as it is on a machine without a GPU: it builds, and says what it cannot do."""

import dataclasses
import json
import os
import shutil
import sys

import pytest

from engines import __main__ as cli
from engines import store
from engines.bundle import Bundle
from engines.spec import EngineConfig, EngineError
from engines.store.choose import choose
from engines.tensorrt import vendor
from engines.tensorrt.backend import ENTERPRISE, RTX
from engines.tensorrt.record import ABOUT, PLAN
from export.__main__ import main as export_main
from models import tiny
from tests.cases.tensorrt import config, needs_rtx, without_gpu

pytestmark = needs_rtx


@pytest.mark.parametrize("component", ["unet", "vae_decoder"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_builds_every_precision_for_a_gpu_that_is_not_here(originals, tmp_path, dtype, component):
    bundle = Bundle.open(shutil.copytree(originals[dtype], tmp_path / "small"))
    path = store.build(bundle, component, config(bundle, component), check=False)
    about = json.loads((path / ABOUT).read_text())
    assert about["arch"] == "sm_89" and about["library"] == {"tensorrt-rtx": vendor.package("tensorrt-rtx").__version__}
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
    trt = vendor.package("tensorrt-rtx")
    log = vendor.log(trt)
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


CHANGES = {"backend": "openvino", "dtype": "bf16", "dims": {"batch": 3},
           "device": "sm_86", "threads": 1, "options": {"workspace": "64"}}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(EngineConfig)])
def test_every_config_field_changes_the_key(bundle, field):
    own = config(bundle)
    other = dataclasses.replace(own, **{field: CHANGES[field]})
    assert store.directory_name(bundle, "unet", other) != store.directory_name(bundle, "unet", own)


def test_another_version_of_the_library_makes_an_engine_stale(bundle, monkeypatch):
    record = store.Record.read(store.build(bundle, "vae_decoder", config(bundle, "vae_decoder")), "")
    assert record.key["versions"] == {"tensorrt-rtx": vendor.package("tensorrt-rtx").__version__, "arch": "sm_89"}
    monkeypatch.setattr(vendor.package("tensorrt-rtx"), "__version__", "9.9")
    assert "versions.tensorrt-rtx" in (store.stale(bundle, record) or "")


@pytest.mark.parametrize(("flavour", "module"), [(RTX, "tensorrt_rtx_bindings"), (ENTERPRISE, "tensorrt")],
                         ids=["tensorrt-rtx", "tensorrt"])
def test_a_missing_package_names_the_pip_line(flavour, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert flavour.available() == f"backend {flavour.name}: the package is missing; run: {vendor.PIP[flavour.name]}"


@without_gpu
def test_tensorrt_itself_needs_its_gpu(bundle):
    assert ENTERPRISE.available() is not None
    with pytest.raises(EngineError, match=r"backend tensorrt: |got device cuda:0 on a machine of 0"):
        store.build(bundle, "unet", config(bundle, backend="tensorrt", device="cuda:0"))


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
