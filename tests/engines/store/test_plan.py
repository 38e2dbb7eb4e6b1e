"""Which engines the runtime needs: by roles, parts, variants and groups of tensors, whatever the names are."""

import dataclasses

import pytest

import engines
from engines import store
from engines.bundle import Bundle
from engines.spec import TensorSpec

TEXT, TIME, BODY = ("m_text", "m_time", "m_body")


def added(group):
    return TensorSpec(f"{group}_0", "float32", ("batch",), group)


@pytest.fixture
def larger(bundle):
    """A denoiser "m" in parts, with a variant that is given residuals and one that is given other frames."""
    old = bundle.manifest.components

    def graph(network="m", inputs=(), outputs=(), **rest):
        spec = old["unet"]
        return dataclasses.replace(spec, network=network, inputs=(*spec.inputs, *inputs), outputs=outputs, **rest)

    frames = (added("residual"), added("first"))
    return Bundle(bundle.path, dataclasses.replace(bundle.manifest, components={
        "words": old["text_encoder"], "m": graph(), TEXT: graph(part="text", rows=2), TIME: graph(part="time", rows=32),
        BODY: graph(part="body"), "m_with": graph(variant="control", inputs=(added("residual"),)),
        "m_with_body": graph(variant="control", part="body", inputs=(added("residual"),)),
        "m_video": graph(variant="frames", inputs=frames, outputs=(added("hidden"),)),
        "m_video_body": graph(variant="frames", part="body", inputs=frames, outputs=(added("hidden"),)),
        "picture": old["vae_decoder"]}))


def attached(bundle):
    """A network that gives residuals."""
    net = dataclasses.replace(bundle.component("m"), role="controlnet", network="net", label="edge",
                              outputs=(added("residual"),))
    components = {**bundle.manifest.components, "net": net}
    return Bundle(bundle.path, dataclasses.replace(bundle.manifest, components=components))


@pytest.fixture(params=[True, False], ids=["in-parts", "whole"])
def in_parts(request, monkeypatch):
    monkeypatch.setattr(engines.backend("onnxruntime"), "in_parts", request.param)
    return request.param


def test_networks_run_in_parts_or_whole(larger, in_parts):
    expected = ["words", *((TEXT, TIME, BODY) if in_parts else ("m",)), "picture"]
    assert store.used(larger, "onnxruntime") == expected
    assert store.in_parts(larger, "onnxruntime") == in_parts == store.in_parts(larger, "onnxruntime", "m")
    assert not store.in_parts(larger, "onnxruntime", "text_encoder")


def test_a_variant_is_used_where_another_network_feeds_it(larger, in_parts):
    before, after = (set(store.used(bundle, "onnxruntime")) for bundle in (larger, attached(larger)))
    assert after - before == {"net", "m_with_body" if in_parts else "m_with"}


def test_a_plan_has_the_rows_of_every_component(larger):
    plan = store.plan(larger, "onnxruntime", batches=[1, 2], sizes=[(64, 64)])
    rows = {name: sorted(config.dims["batch"] for other, config in plan if other == name) for name, _ in plan}
    assert rows == {"words": [2], TEXT: [2], TIME: [32], BODY: [1, 2, 4], "picture": [1]}
    assert len(plan) == len({(name, str(config.to_json())) for name, config in plan})


def test_a_plan_is_for_sizes_tokens_and_settings(bundle):
    plan = store.plan(bundle, "onnxruntime", sizes=[(64, 64), (64, 96)], components=["unet"], tokens=154, threads=3)
    shapes = [(config.dims["latent_width"], config.dims["batch"]) for _, config in plan]
    assert shapes == [(8, 1), (8, 2), (12, 1), (12, 2)]
    assert {(config.dims["sequence"], config.threads) for _, config in plan} == {(154, 3)}
    with pytest.raises(ValueError, match="size: got 64x60"):
        store.plan(bundle, "onnxruntime", sizes=[(64, 60)])


@pytest.mark.parametrize(("component", "rows", "words"), [
    ("unet", 2, ["--component", "unet", "--batch", "1", "--dtype", "fp32", "--size", "64x96", "--rebuild"]),
    ("unet", 3, ["--component", "unet", "--batch", "3", "--dtype", "fp32", "--size", "64x96", "--rebuild"]),
    ("text_encoder", 2, ["--component", "text_encoder", "--batch", "1", "--dtype", "fp32", "--rebuild"])])
def test_the_command_that_builds_an_engine_again(bundle, component, rows, words):
    config = bundle.config(component, backend="openvino", size=(64, 96), batch=rows)
    command = store.rebuild_command(bundle, component, config).split()
    assert command[:2] == ["build", "it"] and command[-len(words):] == words
