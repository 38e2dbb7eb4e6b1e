"""Exported bundles: graphs that compute what PyTorch computes, and nothing published when something goes wrong."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from engines import Bundle, EngineError, store
from export import ExportError, export
from export.__main__ import main
from export.families.stable_diffusion import UNet, graphs
from export.sources.checkpoint import Checkpoint, open_checkpoint
from export.trace import component, trace
from export.trace.component import export_component
from tests.tolerances import EXPORT_REL_RMS
from tests.tools import compvis

COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
UNET_PARTS = ("unet_text", "unet_time", "unet_body", "unet_control", "unet_control_body", "unet_frames",
              "unet_frames_body")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(checkpoints) -> Path:
    return checkpoints["sd1"]


@pytest.fixture(scope="module")
def bundle(bundles, tmp_path_factory) -> Bundle:
    """As it was exported: without the engines of other tests."""
    path = tmp_path_factory.mktemp("exported") / "sd1"
    return Bundle.open(shutil.copytree(bundles["sd1"], path, ignore=shutil.ignore_patterns("engines")))


@pytest.fixture(scope="module")
def small(checkpoints) -> Checkpoint:
    """An SD 2 with two UNet levels, which traces in half the time."""
    return open_checkpoint(checkpoints["sd2"])


def dims(height: int, width: int, batch: int, sequence: int) -> dict[str, int]:
    return {"batch": batch, "latent_height": height, "latent_width": width, "height": 8 * height, "width": 8 * width,
            "sequence": sequence}


def rel_rms(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))


def run(file: Path, inputs: tuple[torch.Tensor, ...]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: x.numpy() for value, x in zip(session.get_inputs(), inputs, strict=True)})


def error(file: Path, name: str, checkpoint: Checkpoint, size: dict[str, int]) -> float:
    kind = graphs(checkpoint)[name]
    graph = kind(checkpoint.load(kind.source), checkpoint)
    inputs = graph.example(size, seed=5)
    with torch.no_grad():
        expected = graph.run(inputs)
    return max(rel_rms(a, b.numpy()) for a, b in zip(run(file, inputs), expected, strict=True))


@pytest.mark.parametrize("size", [dims(8, 8, 1, 77), dims(24, 16, 5, 30)], ids=["one-square", "five-tall"])
@pytest.mark.parametrize("name", COMPONENTS)
def test_graph_equals_pytorch_at_other_sizes(folder, bundle, name, size):
    file = bundle.path / bundle.component(name).file
    assert error(file, name, open_checkpoint(folder), size) < EXPORT_REL_RMS["fp32"]


def test_timestep_is_read_for_each_row(folder, bundle):
    graph = UNet(open_checkpoint(folder).load("unet"), open_checkpoint(folder))
    sample, _, text = graph.example(dims(8, 8, 1, 77), seed=5)
    file = bundle.path / "unet.onnx"
    rows = [run(file, (sample, torch.tensor([t]), text))[0] for t in (3.0, 903.0)]
    both, = run(file, (sample.repeat(2, 1, 1, 1), torch.tensor([3.0, 903.0]), text.repeat(2, 1, 1)))
    assert rel_rms(rows[0], rows[1]) > 1e-3
    assert rel_rms(both, np.concatenate(rows)) < EXPORT_REL_RMS["fp32"]


def test_vae_graphs_speak_the_latents_of_the_unet(folder, bundle):
    """The scale is inside: the encoder's mean is diffusers' mean times it, and the decoder takes that."""
    vae, scale = open_checkpoint(folder).load("vae"), open_checkpoint(folder).scale
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    mean, std = run(bundle.path / "vae_encoder.onnx", (image,))
    decoded, = run(bundle.path / "vae_decoder.onnx", (torch.from_numpy(mean),))
    with torch.no_grad():
        latents = vae.encode(image).latent_dist
        expected = vae.decode(latents.mean).sample
    assert rel_rms(mean, latents.mean.numpy() * scale) < EXPORT_REL_RMS["fp32"]
    assert rel_rms(std, latents.std.numpy() * scale) < EXPORT_REL_RMS["fp32"]
    assert rel_rms(decoded, expected.numpy()) < EXPORT_REL_RMS["fp32"]


@pytest.mark.parametrize("name, dtype", [("vae_decoder", "fp16"), ("text_encoder", "fp16"), ("unet", "bf16"),
                                         pytest.param("unet", "fp16", marks=pytest.mark.slow)])
def test_16_bit_component(small, tmp_path, name, dtype):
    """A UNet hands float32 from part to part."""
    made = export_component(name, small, dtype, tmp_path)
    got = made[name]
    assert 0 < got.check.rel_rms < EXPORT_REL_RMS[dtype]
    model = ir.load(tmp_path / got.file)
    outside = {value.dtype.numpy() for value in (*model.graph.inputs, *model.graph.outputs)}
    assert outside <= {np.dtype("float32"), np.dtype("int64")}
    narrow = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[dtype]
    weights = [value for value in model.graph.initializers.values() if value.name.endswith(".weight")]
    assert weights and {value.dtype for value in weights} == {narrow}
    assert list(made) == [name, *(UNET_PARTS if name == "unet" else ())]
    files = [f"{part}.onnx" for part in made]
    assert sorted(os.listdir(tmp_path)) == sorted([*files, f"{name}.onnx.data"])  # the widened copy is gone
    for part in [part for part in made if part != name]:
        assert 0 < made[part].check.rel_rms < EXPORT_REL_RMS[dtype]
        graph = ir.load(tmp_path / f"{part}.onnx").graph
        assert {value.dtype for value in (*graph.inputs, *graph.outputs)} == {ir.DataType.FLOAT}
        if part != "unet_text":  # which is a product with weights, and has no constants
            assert narrow in {value.dtype for value in graph.initializers.values()}


def test_sites_are_single_nodes(bundle):
    """As many as the architecture has: 4 levels of 1 + 2 resnets, and a transformer in all but the lowest."""
    sites = {name: dict(component.sites) for name, component in bundle.manifest.components.items()}
    assert sites["unet"] == {"Attention": 20, "GroupNormalization": 39, "LayerNormalization": 30, "Gelu": 10}
    assert sites["text_encoder"] == {"Attention": 3, "LayerNormalization": 7}
    assert sites["vae_decoder"] == {"Attention": 1, "GroupNormalization": 22}
    assert sites["vae_encoder"] == {"Attention": 1, "GroupNormalization": 14}


def test_weights_are_gone_before_the_check(small, tmp_path, monkeypatch):
    """A UNet's gigabytes would otherwise be in memory twice."""
    model = small.load("text_encoder")
    weight = weakref.ref(model.final_layer_norm.weight)
    held, check, found = [model], component._check, []
    del model

    def look(*arguments):
        gc.collect()
        found.append(weight())
        return check(*arguments)

    monkeypatch.setattr(component, "_check", look)
    checkpoint = dataclasses.replace(small, load=lambda name: held.pop())
    export_component("text_encoder", checkpoint, "fp32", tmp_path)
    assert found == [None]


def test_missing_site_is_an_error(small, tmp_path, monkeypatch):
    def attention(q, k, v, **_):
        return (q @ k.mT).softmax(-1) @ v

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", attention)
    with pytest.raises(ExportError, match="text_encoder: the graph has 0 Attention nodes, the model 2 such modules"):
        export_component("text_encoder", small, "fp32", tmp_path)


def test_graph_over_tolerance_is_an_error(small, tmp_path, monkeypatch):
    def scaled(*arguments):
        model, sites = trace.trace(*arguments)
        weight = model.graph.initializers["final_layer_norm.weight"]
        weight.const_value = ir.tensor(weight.const_value.numpy() * 1.01, name=weight.name)
        return model, sites

    monkeypatch.setattr(component, "trace", scaled)
    with pytest.raises(ExportError, match=r"text_encoder.onnx in fp32: .* differs .* nothing was published"):
        export_component("text_encoder", small, "fp32", tmp_path)


def test_weights_keep_their_names_and_layout(folder, bundle):
    unet = open_checkpoint(folder).load("unet").state_dict()
    stored = ir.load(bundle.path / "unet.onnx").graph.initializers
    assert unet.keys() <= stored.keys()
    assert [k for k, v in unet.items() if not np.array_equal(stored[k].const_value.numpy(), v.numpy())] == []


def test_graphs_say_nothing_of_this_machine(bundle):
    for name in COMPONENTS:
        content = (bundle.path / f"{name}.onnx").read_bytes()
        assert b"site-packages" not in content and str(ROOT).encode() not in content


def test_manifest(folder, bundle):
    manifest = bundle.manifest
    assert (manifest.family, manifest.prediction_type) == ("stable-diffusion", "epsilon")
    assert manifest.default_size == (64, 64)
    latent = manifest.latent
    assert (latent.channels, latent.scale, latent.shift, latent.factor, latent.multiple) == (4, 0.18215, 0.0, 8, 8)
    assert manifest.scheduler == json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    text, = manifest.text
    assert (text.max_length, text.pad_id, text.hidden_layer) == (77, 527, "last")
    own = [manifest.components[name] for name in COMPONENTS]
    shapes = {spec.name: spec.shape for c in own for spec in (*c.inputs, *c.outputs)}
    latents = ("batch", 4, "latent_height", "latent_width")
    assert shapes == {
        "input_ids": ("batch", 77), "embeddings": ("batch", 77, 32), "placed": ("batch", 77),
        "hidden_states": ("batch", 77, 32), "sample": latents, "timestep": ("batch",),
        "encoder_hidden_states": ("batch", "sequence", 32), "noise_pred": latents, "latents": latents, "mean": latents,
        "std": latents, "image": ("batch", 3, "height", "width")}
    for c in manifest.components.values():
        graph = ir.load(bundle.path / c.file).graph
        named = {v.name: tuple(d if isinstance(d, int) else d.value for d in v.shape)
                 for v in (*graph.inputs, *graph.outputs)}
        assert named == {spec.name: spec.shape for spec in (*c.inputs, *c.outputs)}
    assert manifest.provenance["source"] == "sd1"
    assert set(manifest.provenance["sha256"]) == {
        "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors"}


def test_every_file_is_hashed(bundle):
    listed = {f for c in bundle.manifest.components.values() for f in c.files} | set(bundle.manifest.files)
    found = {str(f.relative_to(bundle.path)) for f in bundle.path.rglob("*") if f.is_file()}
    assert found == listed | {"manifest.json"}
    for c in bundle.manifest.components.values():
        bundle.verify(c.files)
    with pytest.raises(EngineError, match="damaged"):
        bundle.verify({"unet.onnx": "0" * 64})


def test_manifest_with_an_unknown_key_is_refused(bundle, tmp_path):
    data = json.loads((bundle.path / "manifest.json").read_text())
    data["components"]["unet"]["color"] = "blue"
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(EngineError, match=r"components\.unet: got unknown keys \['color'\]"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("text", ["the cat on the horse", "", "a very long story, " * 40, "Ünïcode 日本 ☃!"])
def test_tokenizer_gives_the_ids_of_transformers(folder, bundle, text):
    got = Tokenizer.from_file(str(bundle.path / bundle.manifest.text[0].tokenizer)).encode(text).ids
    assert got == CLIPTokenizer.from_pretrained(folder / "tokenizer")(text).input_ids


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1_two_levels", "sd2"])
def test_single_file_gives_the_same_graphs_as_its_folder(checkpoints, bundles, tmp_path, family):
    """And the engines that were asked for."""
    file = compvis.save(compvis.with_ema(compvis.from_folder(checkpoints[family])), tmp_path / "model.ckpt")
    engines = ["--backend", "onnxruntime", "--size", "64x80"]
    assert main([str(file), "-o", str(tmp_path / "bundle"), "--config", str(checkpoints[family]), "--quiet",
                 *engines]) == 0
    bundle = Bundle.open(tmp_path / "bundle")
    a, b = bundle.manifest, Bundle.open(bundles[family]).manifest
    assert {n: c.files for n, c in a.components.items()} == {n: c.files for n, c in b.components.items()}
    assert (a.scheduler, a.text, a.latent) == (b.scheduler, b.text, b.latent)
    for name in store.used(bundle, "onnxruntime"):
        rows = bundle.component(name).row_counts(1)[-1]
        config = bundle.config(name, backend="onnxruntime", size=(64, 80), batch=rows)
        assert store.find(bundle, name, config), name


def test_existing_output_is_kept(folder, bundle, capsys):
    before = (bundle.path / "manifest.json").stat()
    assert main([str(folder), "-o", str(bundle.path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {bundle.path} exists; choose another place or pass --force")
    assert (bundle.path / "manifest.json").stat() == before


def test_full_disk_leaves_the_old_bundle(folder, bundle, tmp_path):
    """The disk is full as far as this process can tell: no file may grow beyond 64 KiB."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "manifest.json").write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, limits[1]))
    try:
        with pytest.raises(EngineError, match=r"could not write .*what was there before is unchanged"):
            export(folder, tmp_path / "old", force=True, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["old"] and (tmp_path / "old" / "manifest.json").read_text() == "old"


def test_two_exports_and_ctrl_c(folder, tmp_path):
    """While one process exports, another to the same place is refused; interrupted, it leaves nothing behind."""
    output = tmp_path / "bundle"
    command = [sys.executable, "-m", "export", str(folder), "-o", str(output)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: list(tmp_path.glob(".bundle.*.tmp/text_encoder.onnx")), process)
        with pytest.raises(EngineError, match="being written by another process"):
            export(folder, output, progress=False)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert (process.returncode, said.splitlines()[-1]) == (130, "interrupted; nothing half-written was kept")
    assert os.listdir(tmp_path) == []


def wait_for(condition, process: subprocess.Popen) -> None:
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    pytest.fail("waited for two minutes")


@pytest.mark.parametrize("arguments, message", [
    (["nowhere"], "nowhere: no such file or folder"),
    (["pyproject.toml"], "ends in '.toml', expected .safetensors or .ckpt"),
    (["tests"], "tests: not a diffusers folder"),
], ids=["missing", "text-file", "other-folder"])
def test_errors_are_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main([*arguments, "-o", str(tmp_path / "bundle")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("arguments", [["--dtype", "int8"], ["--size", "512"], ["--batch", "0"], ["--gpu", "hopper"],
                                       ["--backend", "abacus"]], ids=" ".join)
def test_wrong_option(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["model", "-o", "bundle", *arguments])
    assert arguments[1] in capsys.readouterr().err


def test_dtype_from_python(folder, tmp_path):
    with pytest.raises(ExportError, match="dtype: got 'int8', expected auto, fp32, fp16, bf16"):
        export(folder, tmp_path / "bundle", dtype="int8")


def test_help_imports_nothing_heavy():
    code = ("import sys, export.__main__ as m\ntry: m.main(['--help'])\nexcept SystemExit: pass\n"
            "print(sorted({'torch', 'onnx', 'diffusers', 'transformers', 'runtime'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "examples:" in done.stdout
