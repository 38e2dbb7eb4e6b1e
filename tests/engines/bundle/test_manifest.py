"""The manifest's reader and writer."""

import dataclasses
import hashlib
import json
import os
import shutil

import pytest

from engines.bundle import Bundle, DimSpec, hash_file, resolve_dims
from engines.bundle.manifest import LARGE
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
    assert first.manifest.components["unet"].inputs[0] == TensorSpec(
        "sample", "float32", ("batch", 4, "latent_height", "latent_width"))
    again = json.loads(json.dumps(first.manifest.to_json()))
    (path / "manifest.json").write_text(json.dumps(again))
    assert Bundle.open(path).manifest == first.manifest


@pytest.mark.parametrize("place", ["", "latent", "components.unet", "components.unet.check", "text.0",
                                   "components.unet.inputs.0"])
@pytest.mark.parametrize("kind", ["unknown", "missing"])
def test_unknown_and_missing_keys_are_refused(path, place, kind):
    def change(data):
        for step in place.split(".") if place else ():
            data = data[int(step)] if step.isdigit() else data[step]
        if kind == "unknown":
            data["surprise"] = 1
        else:
            del data[next(k for k in data if k not in ("format", "extra_channels"))]
    edit(path, change)
    with pytest.raises(EngineError, match=r"unknown keys.*surprise" if kind == "unknown" else "missing|not a latentrt"):
        Bundle.open(path)


def test_a_newer_format_is_refused(path):
    edit(path, lambda data: data.update(format=99))
    with pytest.raises(EngineError, match="format 99, this version reads up to 2; update latentrt"):
        Bundle.open(path)


@pytest.mark.parametrize("text", ["{", "[]", "1", '{"format": 1}', '{"format": "1"}',
                                  '{"format": 1, "components": []}'])
def test_a_damaged_manifest_is_refused(path, text):
    (path / "manifest.json").write_text(text)
    with pytest.raises(EngineError, match=r"manifest\.json"):
        Bundle.open(path)


def test_no_bundle_names_the_command_that_makes_one(tmp_path):
    with pytest.raises(EngineError, match=r"got nothing, expected a bundle.*python -m export"):
        Bundle.open(tmp_path / "nowhere")
    with pytest.raises(EngineError, match="a directory without one"):
        Bundle.open(tmp_path)


def test_an_unknown_component_lists_those_there_are(path):
    with pytest.raises(EngineError, match="'unett', expected one of text_encoder, unet, vae_decoder"):
        Bundle.open(path).component("unett")


def test_config_sets_only_the_dimensions_a_component_has(path):
    bundle = Bundle.open(path)
    shape = {"backend": "openvino", "size": (64, 96), "batch": 3}
    assert bundle.config("unet", **shape) == EngineConfig(
        "openvino", {"batch": 3, "latent_height": 8, "latent_width": 12, "sequence": 77})
    assert bundle.config("unet", **shape, tokens=154).dims["sequence"] == 154
    assert bundle.config("vae_decoder", **shape).dims == {
        "batch": 3, "height": 64, "width": 96, "latent_height": 8, "latent_width": 12}
    assert bundle.config("text_encoder", backend="openvino", batch=3) == bundle.config("text_encoder", **shape)
    with pytest.raises(EngineError, match="component unet: dimension latent_height ← height: got no size, expected one"):
        bundle.config("unet", backend="openvino", batch=3)


DIMS = {"latent_height": DimSpec("height", 8), "latent_width": DimSpec("width", 8), "frames": DimSpec(size=14),
        "latent_height_2": DimSpec("latent_height", 2), "latent_width_2": DimSpec("latent_width", 2)}


def test_dimensions_follow_from_others_rounded_up(path):
    names = ["latent_height", "latent_height_2", "frames", "width"]
    found = resolve_dims(names, {"height": 72, "width": 8}, DIMS)
    assert found == {"latent_height": 9, "latent_height_2": 5, "frames": 14, "width": 8}
    assert resolve_dims(["frames", "latent_height_2"], {"frames": 2, "latent_height": 4}, DIMS) == {
        "frames": 2, "latent_height_2": 2}
    for dims in ({}, {"x": DimSpec("y")}, {"x": DimSpec("y"), "y": DimSpec("x")}):
        with pytest.raises(EngineError, match="dimension x.*: got no size, expected one of batch"):
            resolve_dims(["x"], {"batch": 1}, dims)
    for wrong in ({}, {"of": "x", "size": 1}, {"of": "x", "divisor": 0}, {"size": -1}):
        with pytest.raises(EngineError, match="manifest dims: got DimSpec"):
            DimSpec(**wrong)


def test_the_size_of_the_picture_is_known_from_what_an_engine_has(path):
    manifest = dataclasses.replace(Bundle.open(path).manifest, dims=DIMS)
    assert manifest.picture_size({"batch": 1, "height": 60, "width": 8, "latent_height": 8}) == (60, 8)
    assert manifest.picture_size({"latent_height_2": 2, "latent_width": 3, "latent_width_2": 2}) == (32, 24)
    assert manifest.picture_size({"batch": 1, "frames": 14}) is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_verify_names_the_damaged_file(path, damage):
    bundle = Bundle.open(path)
    files = bundle.component("unet").files
    bundle.verify(files)
    file = path / "unet.onnx.data"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data if damage == "flip" else data[:-1])
    if damage == "remove":
        file.unlink()
    with pytest.raises(EngineError, match=r"unet\.onnx\.data is (damaged|missing).*python -m export"):
        bundle.verify(files)


def test_config_is_checked_and_round_trips():
    config = EngineConfig("openvino", {"batch": 2, "frames": 3}, "bf16", options={"a": 1})
    assert EngineConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(EngineError, match=r"unknown keys.*surprise"):
        EngineConfig.from_json({**config.to_json(), "surprise": 1})
    for wrong, message in (({"dtype": "fp64"}, "dtype: got 'fp64'"), ({"threads": 1.5}, "threads: got 1.5, .* least 0"),
                           ({"dims": {"batch": 0}}, "batch: got 0, expected a whole number of at least 1"),
                           ({"dims": {"batch": True}}, "batch: got True"), ({"dims": 3}, "dims: got 3")):
        with pytest.raises(EngineError, match=message):
            EngineConfig("openvino", **wrong)


def test_a_spec_needs_every_dimension():
    assert TensorSpec("x", "float32", ("batch", 4)).resolve({"batch": 2}).shape == (2, 4)
    with pytest.raises(EngineError, match="tensor x: got dimension 'height'"):
        TensorSpec("x", "float32", ("height", 4)).resolve({"batch": 2})


def test_a_large_file_is_hashed_again_when_it_has_changed(tmp_path):
    file = tmp_path / "weights"
    file.touch()
    os.truncate(file, LARGE)
    zeros = hash_file(file)
    assert hash_file(file) == zeros == hashlib.sha256(bytes(LARGE)).hexdigest()
    with open(file, "r+b") as stream:
        stream.seek(LARGE // 2)
        stream.write(b"1")
    assert hash_file(file) != zeros
