"""What is asked of a bundle: graphs by role, network, part and variant; sizes; whether its files are whole."""

import dataclasses
import hashlib
import os
import shutil

import pytest

from engines.bundle import Bundle, DimSpec, hash_file, resolve_dims
from engines.bundle.files import LARGE
from engines.spec import EngineConfig, EngineError
from tests.tools.small import small_bundle


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return small_bundle(tmp_path_factory.mktemp("bundle") / "small").path


@pytest.fixture
def path(original, tmp_path):
    return shutil.copytree(original, tmp_path / "small")


def test_an_unknown_component_lists_those_there_are(path):
    with pytest.raises(EngineError, match="'unett', expected one of text_encoder, unet, vae_decoder"):
        Bundle.open(path).component("unett")


@pytest.fixture
def larger(path):
    """Names say nothing: a denoiser called "a", two text encoders, a ControlNet of two graphs and a variant."""
    bundle = Bundle.open(path)
    old = bundle.manifest.components

    def graph(network, **rest):
        return dataclasses.replace(old["unet"], network=network, **rest)

    return Bundle(path, dataclasses.replace(bundle.manifest, components={
        "t1": dataclasses.replace(old["text_encoder"], network="first"),
        "x": graph("net", role="controlnet", label="edge"),
        "a": graph("a"), "b": graph("a", part="body", dtype="bf16"), "c": graph("a", part="body", variant="control"),
        "y": graph("net", role="controlnet", label="edge", part="hint"),
        "t2": dataclasses.replace(old["text_encoder"], network="second")}))


def test_graphs_are_found_by_what_they_are_for(larger):
    assert (larger.denoiser, larger.dtype) == ("a", "fp32")
    assert larger.of_role("text_encoder") == ("first", "second") and larger.of_role("image_encoder") == ()
    assert list(larger.graphs("net")) == ["x", "y"] and larger.graphs("unet") == {}
    assert [larger.graph("a", *place)[0] for place in ((), ("body",), ("body", "control"))] == ["a", "b", "c"]
    assert larger.graph("net", "hint") == ("y", larger.component("y"))
    assert larger.labels == ("edge",) and larger.label("edge") == "net" and larger.network("text_encoder") == "first"


def test_what_is_not_there_is_named(larger):
    for ask, message in ((lambda: larger.graph("a", "text"), "network 'a' with part 'text' and variant '', expected"),
                         (lambda: larger.graph("a", "", "frames"), "network 'a' with part '' and variant 'frames'"),
                         (lambda: larger.label("pose"), r"got 'pose', expected one that is attached \(edge\)"),
                         (lambda: larger.label(""), r"got '', expected one that is attached"),
                         (lambda: larger.network("first_stage_encoder"), "got no first_stage_encoder, expected one")):
        with pytest.raises(EngineError, match=message):
            ask()


def test_the_loop_says_what_runs_at_every_step(larger):
    components = {name: dataclasses.replace(component, role="decode") if name == "t2" else component
                  for name, component in larger.manifest.components.items()}
    codes = dataclasses.replace(larger.manifest, loop="tokens", components=components)
    assert Bundle(larger.path, codes).denoiser == "second"


def test_config_sets_only_the_dimensions_a_component_has(path):
    bundle = Bundle.open(path)
    shape = {"backend": "openvino", "size": (64, 96), "batch": 3}
    assert bundle.config("unet", **shape) == EngineConfig(
        "openvino", {"batch": 3, "latent_height": 8, "latent_width": 12, "sequence": 77})
    assert bundle.config("unet", **shape, tokens=154).dims["sequence"] == 154
    assert bundle.config("unet", **shape, sizes={"latent_width": 5}).dims["latent_width"] == 5
    assert bundle.config("vae_decoder", **shape).dims == {
        "batch": 3, "height": 64, "width": 96, "latent_height": 8, "latent_width": 12}
    assert bundle.config("text_encoder", backend="openvino", batch=3) == bundle.config("text_encoder", **shape)
    with pytest.raises(EngineError, match="component unet: dimension latent_height ← height: got no size, expected"):
        bundle.config("unet", backend="openvino", batch=3)


DIMS = {"latent_height": DimSpec("height", 8), "latent_width": DimSpec("width", 8), "frames": DimSpec(size=14),
        "latent_height_2": DimSpec("latent_height", 2), "latent_width_2": DimSpec("latent_width", 2)}


def test_dimensions_follow_from_others_rounded_up():
    names = ["latent_height", "latent_height_2", "frames", "width"]
    sizes = resolve_dims(names, {"height": 72, "width": 8}, DIMS)
    assert sizes == {"latent_height": 9, "latent_height_2": 5, "frames": 14, "width": 8}
    assert resolve_dims(["frames", "latent_height_2"], {"frames": 2, "latent_height": 4}, DIMS) == {
        "frames": 2, "latent_height_2": 2}
    for dims in ({}, {"x": DimSpec("y")}, {"x": DimSpec("y"), "y": DimSpec("x")}):
        with pytest.raises(EngineError, match=r"dimension x.*: got no size, expected one of batch"):
            resolve_dims(["x"], {"batch": 1}, dims)
    for wrong in ({}, {"of": "x", "size": 1}, {"of": "x", "divisor": 0}, {"size": -1}):
        with pytest.raises(EngineError, match="manifest dims: got DimSpec"):
            DimSpec(**wrong)


def test_the_size_of_the_picture_is_known_from_what_an_engine_has(path):
    bundle = Bundle(path, dataclasses.replace(Bundle.open(path).manifest, dims=DIMS))
    for dims, size in (({"batch": 1, "height": 60, "width": 8, "latent_height": 8}, (60, 8)),
                       ({"latent_height_2": 2, "latent_width": 3, "latent_width_2": 2}, (32, 24)),
                       ({"batch": 1, "frames": 14}, None)):
        assert bundle.picture_size(EngineConfig("openvino", dims)) == size


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
