"""Whose kernels an OpenVINO engine has: chosen by option, and what a wrong choice gives."""

import numpy as np
import pytest

from engines.bundle import Bundle
from engines.openvino import extension
from engines.openvino.backend import OPENVINO
from engines.openvino.options import Options
from engines.spec import EngineConfig, EngineError
from engines.store import store
from tests.tools.openvino_graphs import needs_extension

pytest.importorskip("openvino")


@needs_extension
@pytest.mark.parametrize("kind", list(extension.OPS))
def test_the_option_chooses_whose_kernel_an_engine_has(bundles, kind: str) -> None:
    bundle = Bundle.open(bundles["shapes"])
    results = {}
    for whose in ("ours", "vendor"):
        options = dict.fromkeys(extension.OPS, "vendor") | {kind: whose}
        config = bundle.config("unet", backend="openvino", size=(64, 64), batch=2, options=options)
        engine = store.load(bundle, "unet", config)
        rng = np.random.default_rng(0)
        buffers = {spec.name: spec.empty() for spec in (*engine.inputs.values(), *engine.outputs.values())}
        for spec in engine.inputs.values():
            buffers[spec.name][:] = rng.standard_normal(buffers[spec.name].shape)
        engine.bind(buffers)
        engine.enqueue()
        results[whose] = buffers["noise_pred"].copy(), set(OPENVINO.versions(config))
    ours, theirs = results["ours"][0], results["vendor"][0]
    assert not np.array_equal(ours, theirs) and np.abs(ours - theirs).max() < 1e-4
    assert results["ours"][1] - results["vendor"][1] == {"kernels"}


def read(dtype: str = "fp32", **options: str) -> frozenset[str]:
    return Options.read(EngineConfig("openvino", {}, dtype=dtype, options=options)).ours


def test_auto_is_ours_wherever_it_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "missing", lambda: None)
    assert read() == read(attention="auto", norm="ours") == {"attention", "norm"}
    assert read("bf16", attention="vendor") == {"norm"}
    assert read("fp16") == read("fp16", norm="auto") == set()
    with pytest.raises(EngineError, match="option norm: got dtype fp16, expected fp32 or bf16"):
        read("fp16", norm="ours")
    monkeypatch.setattr(extension, "missing", lambda: "install a compiler")
    assert read() == read(norm="auto") == set()
    with pytest.raises(EngineError, match="option norm: install a compiler"):
        read(norm="ours")


def test_other_options_are_properties_of_the_plugin() -> None:
    config = EngineConfig("openvino", {}, options={"attention": "vendor", "norm": "vendor", "ENABLE_CPU_PINNING": "NO"})
    assert Options.read(config).properties == {"ENABLE_CPU_PINNING": "NO"}


def test_a_kind_of_site_without_a_kernel_of_ours_is_refused() -> None:
    with pytest.raises(EngineError, match="openvino: got option 'geglu', expected attention, norm or a property"):
        read(attention="vendor", geglu="vendor")


def test_a_wrong_choice_is_refused(bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(bundles["shapes"])

    def load(**options: str) -> None:
        store.load(bundle, "unet", bundle.config("unet", backend="openvino", size=(64, 64), batch=2, options=options))

    with pytest.raises(EngineError, match="option attention: got 'flash', expected ours, vendor or auto"):
        load(attention="flash")
    monkeypatch.setattr(extension, "missing", lambda: "install a compiler")
    with pytest.raises(EngineError, match="option attention: install a compiler"):
        load(attention="ours")
    load()
