"""The manifest's reader and writer, and what it can say of models beyond Stable Diffusion."""

import dataclasses
import json
import shutil
from typing import Any

import pytest

from engines.bundle import (
    Bundle,
    Check,
    Component,
    Condition,
    DimSpec,
    Guidance,
    LatentSpec,
    Manifest,
    TextSpec,
    write_manifest,
)
from engines.spec import EngineConfig, EngineError, TensorSpec
from tests.tools.small import small_bundle


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return small_bundle(tmp_path_factory.mktemp("bundle") / "small").path


@pytest.fixture
def path(original, tmp_path):
    return shutil.copytree(original, tmp_path / "small")


def edit(path, change):
    """Apply `change` to the manifest's JSON object."""
    data = json.loads((path / "manifest.json").read_text())
    change(data)
    (path / "manifest.json").write_text(json.dumps(data))


def test_round_trip(path):
    first = Bundle.open(path)
    assert first.manifest.components["unet"].inputs[:2] == (
        TensorSpec("sample", "float32", ("batch", 4, "latent_height", "latent_width")),
        TensorSpec("timestep", "float32", ("batch",), span=(0, 1000)))
    again = json.loads(json.dumps(first.manifest.to_json()))
    (path / "manifest.json").write_text(json.dumps(again))
    assert Bundle.open(path).manifest == first.manifest


def graph(network: str, role: str, *inputs: TensorSpec, rows: int | str = "branch", **rest: str) -> Component:
    return Component(file=f"{network}.onnx", files={}, dtype="fp16", role=role, network=network, rows=rows,
                     inputs=inputs, outputs=(), sites={}, check=Check("nothing", 0, 0.0, 0.0), **rest)


def of_a_family(**rest: Any) -> Manifest:
    return dataclasses.replace(Manifest(
        family="other", tasks=("class",), components={}, latent=LatentSpec(4, 1.0, 0.0, 4, 8), scheduler={},
        prediction_type="epsilon", default_size=(256, 256), files={}, provenance={}), **rest)


FAMILIES = {
    "classes": of_a_family(
        conditions=(Condition(meaning="class", input="label", source="label", classes=1001, null=1000),),
        guidance=Guidance(form="channels", channels=3), first_stage="vq",
        components={"transformer": graph("transformer", "denoiser",
                                         TensorSpec("label", "int64", ("batch",), span=(0, 1001)))}),
    "layout": of_a_family(
        conditions=(Condition(meaning="boxes", input="context", source="encoder", classes=600, slots=30, grid=90),),
        guidance=Guidance(form="none")),
    "segmentation": of_a_family(
        conditions=(Condition(meaning="segmentation", input="sample", source="picture", channels=3, classes=182),)),
    "pixels": of_a_family(kind="pixel-diffusion", first_stage="none", tasks=("unconditional",)),
    "video": of_a_family(
        latent=LatentSpec(4, 0.18215, 0.0, 8, 8, frames=14), dims={"frames": DimSpec(size=14)},
        guidance=Guidance(form="ramp"),
        conditions=(Condition(meaning="image", input="image_embeds", source="image_encoder"),
                    Condition(meaning="sizes", input="added_time_ids", source="numbers",
                              fields=("fps", "motion", "noise")))),
    "two texts": of_a_family(
        guidance=Guidance(form="embedded", input="guidance"),
        dims={"sequence_2": DimSpec(size=512), "tokens": DimSpec("latent_height", 2)},
        text=(TextSpec("clip", "clip.json", 77, 0, "penultimate"),
              TextSpec("t5", "t5.json", 512, 0, "last", kind="t5"))),
    "codes": of_a_family(
        kind="codes", loop="tokens", first_stage="vq", dims={"cache": DimSpec(size=256)}, tasks=("class", "complete"),
        components={"gpt_prefill": graph("gpt", "prefill"), "gpt_step": graph("gpt", "decode", rows="image")}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_can_be_said(family, tmp_path):
    write_manifest(tmp_path, FAMILIES[family])
    assert Bundle.open(tmp_path).manifest == FAMILIES[family]


def test_conditions_are_found_by_their_meaning():
    manifest = FAMILIES["segmentation"]
    condition = manifest.condition("segmentation")
    assert condition and condition.classes == 182 and manifest.joined == (condition,)
    assert manifest.condition("text") is None and FAMILIES["layout"].joined == ()


@pytest.mark.parametrize(("change", "message"), [
    ({"loop": "walk"}, "manifest loop: got 'walk', expected one of denoise, tokens"),
    ({"tasks": ()}, "manifest tasks: got none"),
], ids=["loop", "tasks"])
def test_a_manifest_of_nothing_known_is_refused(change, message):
    with pytest.raises(EngineError, match=message):
        of_a_family(**change)


def test_rows_and_guidance_are_checked():
    for rows in (0, -1, True, "pair"):
        with pytest.raises(EngineError, match=r"unet.onnx: got rows .*, expected a number of them, or one of image"):
            graph("unet", "denoiser", rows=rows)
    for wrong in ({"form": "strong"}, {"negative": "noise"}):
        with pytest.raises(EngineError, match=r"manifest guidance (form|negative): got"):
            Guidance(**wrong)


def test_rows_follow_from_the_images():
    counts = [graph("unet", "denoiser", rows=rows).row_counts(3) for rows in (32, "image", "branch")]
    assert counts == [(32,), (3,), (3, 6)]


@pytest.mark.parametrize("place", ["", "latent", "components.unet", "components.unet.check", "text.0",
                                   "components.unet.inputs.0", "conditions.0"])
@pytest.mark.parametrize("kind", ["unknown", "missing"])
def test_unknown_and_missing_keys_are_refused(path, place, kind):
    def change(data):
        for step in place.split(".") if place else ():
            data = data[int(step)] if step.isdigit() else data[step]
        if kind == "unknown":
            data["surprise"] = 1
        else:
            del data[next(k for k in data if k not in ("format", "kind", "loop"))]
    edit(path, change)
    with pytest.raises(EngineError, match=r"unknown keys.*surprise" if kind == "unknown" else r"missing keys") as error:
        Bundle.open(path)
    assert place.partition(".")[2] in str(error.value).replace(": ", ".")


@pytest.mark.parametrize(("change", "message"), [
    (lambda data: data.update(components=[]), "components: got list, expected an object"),
    (lambda data: data.update(tasks="all"), "tasks: got str, expected a list"),
    (lambda data: data.update(family={}), "family: got dict, expected a single value"),
    (lambda data: data["components"].update(unet=3), r"components\.unet: got int, expected an object"),
    (lambda data: data["components"]["unet"].update(inputs=3), r"components\.unet: inputs: got int, expected a list"),
], ids=["components", "tasks", "family", "component", "inputs"])
def test_other_types_are_refused(path, change, message):
    edit(path, change)
    with pytest.raises(EngineError, match=message):
        Bundle.open(path)


@pytest.mark.parametrize(("version", "do"), [(2, "export"), (99, "update latentrt, or export"), ("3", "export")])
def test_another_format_is_refused_with_the_command(path, version, do):
    edit(path, lambda data: data.update(format=version))
    with pytest.raises(EngineError, match=f"got bundle format {version!r}, expected 3; {do} the checkpoint again: "
                                          f"python -m export CHECKPOINT -o {path} --force"):
        Bundle.open(path)


@pytest.mark.parametrize("text", ["{", "[]", "1", '{"format": 3}', '{"format": "1"}',
                                  '{"format": 3, "components": []}'])
def test_a_damaged_manifest_is_refused(path, text):
    (path / "manifest.json").write_text(text)
    with pytest.raises(EngineError, match=r"manifest\.json"):
        Bundle.open(path)


def test_no_bundle_names_the_command_that_makes_one(tmp_path):
    with pytest.raises(EngineError, match=r"got nothing, expected a bundle.*python -m export"):
        Bundle.open(tmp_path / "nowhere")
    with pytest.raises(EngineError, match="a directory without one"):
        Bundle.open(tmp_path)


def test_config_is_checked_and_round_trips():
    config = EngineConfig("openvino", {"batch": 2, "frames": 3}, "bf16", options={"a": [1, {"b": None}]})
    assert EngineConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(EngineError, match=r"unknown keys.*surprise"):
        EngineConfig.from_json({**config.to_json(), "surprise": 1})
    for wrong, message in (({"dtype": "fp64"}, "dtype: got 'fp64'"), ({"threads": 1.5}, r"threads: got 1.5, .* 0"),
                           ({"dims": {"batch": 0}}, "batch: got 0, expected a whole number of at least 1"),
                           ({"dims": {"batch": True}}, "batch: got True"), ({"dims": 3}, "dims: got 3")):
        with pytest.raises(EngineError, match=message):
            EngineConfig("openvino", **wrong)


def test_a_spec_needs_every_dimension():
    spec = TensorSpec("x", "float32", ("batch", 4), "hidden", (0, 1)).resolve({"batch": 2})
    assert (spec.shape, spec.group, spec.span) == ((2, 4), "hidden", (0, 1))
    with pytest.raises(EngineError, match="tensor x: got dimension 'height'"):
        TensorSpec("x", "float32", ("height", 4)).resolve({"batch": 2})
