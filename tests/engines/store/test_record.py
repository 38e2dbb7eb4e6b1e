"""What an engine depends on, all of which changes its key; and the record of it."""

import dataclasses
import json

import pytest

import engines
from engines import store
from engines.bundle import Bundle
from engines.check import compare
from engines.check.tolerance import TOLERANCE
from engines.spec import EngineConfig, EngineError
from engines.store.sources import hashes
from tests.engines.cases import config
from tests.tolerances import ENGINE_REL_RMS

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")


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
    monkeypatch.setattr("engines.store.record.hashes", lambda package: dict.fromkeys(hashes(package), "changed"))


@pytest.mark.parametrize(("change", "message"), [
    (lambda r: r.update(format=99), "got engine format 99, expected 3; build it again"),
    (lambda r: r.update(surprise=1), r"unknown keys \['surprise'\]"),
    (lambda r: r.pop("files"), r"missing keys \['files'\]"),
    (lambda r: r.pop("config"), r"missing keys \['config'\]"),
    (lambda r: r["config"].update(surprise=1), "unknown keys"),
], ids=["newer", "unknown", "missing", "no-config", "unknown-config"])
def test_a_damaged_record_names_the_command(bundle, change, message):
    own = config(bundle)
    path = store.build(bundle, "unet", own)
    data = json.loads((path / "engine.json").read_text())
    change(data)
    (path / "engine.json").write_text(json.dumps(data))
    with pytest.raises(EngineError, match=message):
        store.load(bundle, "unet", own)
    (path / "engine.json").write_text("{")
    with pytest.raises(EngineError, match=r"engine.json: not a readable.*engines build .*--rebuild"):
        store.load(bundle, "unet", own)


def test_figures_are_recorded(bundle):
    check = store.Record.read(store.build(bundle, "unet", config(bundle)), "").check
    assert check.reference == "onnxruntime fp32 on cpu" and 0 < check.rel_rms < ENGINE_REL_RMS["fp32"] and check.max_abs
    own = config(bundle, "onnxruntime")
    assert store.Record.read(store.build(bundle, "unet", own), "").check.reference == compare.ITSELF
    skipped = store.build(bundle, "vae_decoder", config(bundle, component="vae_decoder"), check=False)
    assert store.Record.read(skipped, "").check is None


def test_tolerances_are_those_of_the_tests():
    assert TOLERANCE == ENGINE_REL_RMS
