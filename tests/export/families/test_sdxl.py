"""Stable Diffusion XL: its graphs compute what diffusers computes, and what cannot draw with it says so."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from benchmarks import pipeline
from benchmarks.__main__ import main
from benchmarks.harness import components, given, limits, on_cpu, turns
from engines import Bundle, store
from engines.store.choose import choose
from export import ExportError
from export.families.stable_diffusion import graphs
from export.sources.checkpoint import open_checkpoint
from export.sources.single_file import CONFIGS
from export.trace import trace
from export.trace.component import export_component, precision
from runtime.text.tokenizer import PromptTokenizer
from tests.export.test_bundle import dims, error, rel_rms, run
from tests.tolerances import EXPORT_REL_RMS

COMPONENTS = ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder")
CONFIG = json.loads((CONFIGS / "sdxl.json").read_text())


@pytest.fixture(scope="module")
def folder(checkpoints) -> Path:
    return checkpoints["sdxl"]


@pytest.fixture(scope="module")
def bundle(bundles) -> Bundle:
    return Bundle.open(bundles["sdxl"])


@pytest.mark.parametrize("size", [dims(8, 8, 1, 77), dims(6, 4, 5, 30)], ids=["one-square", "five-tall"])
@pytest.mark.parametrize("name", COMPONENTS)
def test_graph_equals_pytorch_at_other_sizes(folder, bundle, name, size):
    file = bundle.path / bundle.component(name).file
    assert error(file, name, open_checkpoint(folder), size) < EXPORT_REL_RMS["fp32"]


def test_16_bit_unet(folder, tmp_path):
    """Its graph is one that ONNX's own type inference accepts, and it is cut in parts like any other."""
    made = export_component("unet", open_checkpoint(folder), "fp16", tmp_path)
    assert list(made) == ["unet", "unet_text", "unet_time", "unet_body", "unet_control", "unet_control_body",
                          "unet_frames", "unet_frames_body"]
    assert 0 < made["unet_body"].check.rel_rms < EXPORT_REL_RMS["fp16"]
    for name in made:
        onnx.checker.check_model(tmp_path / f"{name}.onnx", full_check=True)


def test_the_unet_is_given_what_diffusers_gives_it(folder, bundle):
    """Prompts through the bundle's tokenizers and encoders, and sizes, against the pipeline's own path."""
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    prompts = ["the cat on the horse", ""]
    states, pooled = [], None
    for text in bundle.manifest.text:
        tokenize = PromptTokenizer(bundle.path, text)
        ids = torch.from_numpy(np.stack([tokenize(prompt) for prompt in prompts]))
        component = bundle.component(text.component)
        none = [torch.zeros(spec.resolve({"batch": 2}).shape) for spec in component.inputs[1:]]
        hidden, *rest = run(bundle.path / component.file, (ids, *none))
        assert text.hidden_layer == "penultimate" and bool(rest) == (text.pooled == "text_embeds")
        states.append(hidden)
        pooled = rest[0] if rest else pooled
    joined = np.concatenate(states, axis=-1)
    sample, timestep, sizes = torch.randn(2, 4, 8, 12), torch.tensor([3.0, 903.0]), (64, 96, 0, 8, 64, 96)
    with torch.no_grad():
        expected, _, expected_pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        ids = pipe._get_add_time_ids(sizes[:2], sizes[2:4], sizes[4:], torch.float32, 48).repeat(2, 1)
        prediction = pipe.unet(sample, timestep, expected,
                               added_cond_kwargs={"text_embeds": expected_pooled, "time_ids": ids}).sample
    assert rel_rms(joined, expected.numpy()) < EXPORT_REL_RMS["fp32"]
    assert rel_rms(pooled, expected_pooled.numpy()) < EXPORT_REL_RMS["fp32"]
    feed = (sample, timestep, torch.from_numpy(joined), torch.from_numpy(pooled), torch.tensor([sizes] * 2).float())
    got, = run(bundle.path / "unet.onnx", feed)
    assert rel_rms(got, prediction.numpy()) < EXPORT_REL_RMS["fp32"]
    feed[4][1, 3] = 9  # the left edge of the second row's crop
    moved, = run(bundle.path / "unet.onnx", feed)
    assert np.array_equal(got[0], moved[0]) and rel_rms(moved[1], got[1]) > 1e-4


def test_sites_are_single_nodes(bundle):
    """Four transformers of two blocks: on the way down, in the middle and two on the way up; none at the top level."""
    sites = {name: dict(component.sites) for name, component in bundle.manifest.components.items()}
    assert sites["unet"] == {"Attention": 16, "GroupNormalization": 21, "LayerNormalization": 24, "Gelu": 8}
    assert sites["text_encoder"] == {"Attention": 2, "LayerNormalization": 4}  # of three layers, without the last
    assert sites["text_encoder_2"] == {"Attention": 2, "LayerNormalization": 5, "Gelu": 2}


def test_manifest(bundle):
    manifest = bundle.manifest
    assert (manifest.family, manifest.prediction_type, manifest.default_size) == ("sdxl", "epsilon", (64, 64))
    assert tuple(n for n in manifest.components if not n.startswith("unet_")) == COMPONENTS
    parts = {part: [s.name for s in manifest.components[f"unet_{part}"].inputs] for part in ("text", "time")}
    assert parts == {"text": ["encoder_hidden_states", "text_embeds", "time_ids"], "time": ["timestep"]}
    handed = [s for part in parts for s in manifest.components[f"unet_{part}"].outputs]
    assert all(s.dtype == "float32" and len(s.shape) > 1 and s.shape[0] == "batch" for s in handed)
    assert manifest.latent.scale == 0.13025
    assert [(t.component, t.pad_id) for t in manifest.text] == [("text_encoder", 527), ("text_encoder_2", 0)]
    assert {s.name: s.shape for s in manifest.components["unet"].inputs} == {
        "sample": ("batch", 4, "latent_height", "latent_width"), "timestep": ("batch",),
        "encoder_hidden_states": ("batch", "sequence", 80), "text_embeds": ("batch", 48), "time_ids": ("batch", 6)}
    assert set(manifest.files) == {text.tokenizer for text in manifest.text}


@pytest.mark.parametrize("name", ["unet", "text_encoder_2"])
def test_an_engine_is_as_right_as_that_of_another_model(bundle, name):
    """In the CPU's fastest precision, at sizes such as 1023, which bfloat16 does not hold."""
    backend, dtype = "openvino", choose("openvino")[1]
    config = bundle.config(name, backend=backend, size=(64, 96), batch=2, dtype=dtype)
    assert store.build(bundle, name, config)


def test_benchmarks_give_everyone_the_added_conditions(folder, bundle, tmp_path):
    job = turns.Job(bundle.path, folder, 64, 96, 1, tmp_path)
    assert given.inputs(job)["time_ids"].tolist() == [[64, 96, 0, 0, 64, 96]] * 2
    assert components.relative_rms(on_cpu._onnxruntime(job)(), on_cpu._diffusers("fp32", job)()) <= 1e-4
    assert components._limits(job)()["flops"] == limits.unet_flops(folder, 2, 8, 12)


def test_benchmarks_of_whole_pictures(folder, bundle, tmp_path, capsys):
    """Everyone is given the same text, pooled text and sizes; the floor counts both encoders."""
    job = pipeline.Drawing(bundle.path, folder, 64, 96, 1, tmp_path, prompt="a cat", steps=2, guidance=2.0, seed=5)
    ours, theirs = pipeline._ours("onnxruntime", "fp32", job)(), pipeline._diffusers("fp32", job)()
    assert pipeline.difference(ours.images, theirs.images)["max_difference"] <= 1
    flops = limits.text_encoder_flops(folder, 2)
    shutil.copytree(folder / "text_encoder", tmp_path / "one" / "text_encoder")
    assert 0 < limits.text_encoder_flops(tmp_path / "one", 2) < flops
    assert main(["pipeline", "--random", "sdxl"]) == 2
    assert "--random: got 'sdxl', expected one of sd1, sd2-base, sd2-v" in capsys.readouterr().err


def test_the_vae_of_an_fp16_bundle_is_bf16(folder):
    checkpoint = open_checkpoint(folder)
    assert {name: precision(name, checkpoint, "fp16") for name in graphs(checkpoint)} == {
        name: "bf16" if name.startswith("vae") else "fp16" for name in COMPONENTS}
    assert precision("vae_decoder", checkpoint, "fp32") == "fp32"
    fixed = dataclasses.replace(checkpoint, vae={**checkpoint.vae, "force_upcast": False})
    assert precision("vae_decoder", fixed, "fp16") == "fp16"


@pytest.mark.parametrize(("file", "changes", "message"), [
    ("unet/config.json", {"addition_embed_type": None}, "addition_embed_type=None, expected 'text_time'"),
    ("unet/config.json", {"projection_class_embeddings_input_dim": 80}, "takes 4 numbers for sizes, expected 6"),
    ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "addition_embed_type='text_time', expected None"),
    ("model_index.json", {"_class_name": "StableDiffusionXLAdapterPipeline"}, "got a StableDiffusionXLAdapterPipeline"),
    ("text_encoder_2/config.json", {"vocab_size": 100}, "528 tokens for a text encoder of 100"),
], ids=["no-condition", "sizes", "other-pipeline", "adapter", "tokenizer"])
def test_folder_that_cannot_be_exported(folder, tmp_path, file, changes, message):
    copy = shutil.copytree(folder, tmp_path / "model")
    path = copy / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ExportError, match=message):
        open_checkpoint(copy)


def test_one_tokenizer_for_two_encoders_is_refused(folder):
    with pytest.raises(ExportError, match="a model that has two of its own; leave out --tokenizer"):
        open_checkpoint(folder, tokenizer=folder / "tokenizer")


def test_shipped_configuration_is_that_of_the_published_model():
    """Parameters, kernel sites of the UNet (70 transformer blocks) and operations of a step with guidance."""
    with torch.device("meta"):
        models = {"unet": UNet2DConditionModel.from_config(CONFIG["unet"]),
                  "vae": AutoencoderKL.from_config(CONFIG["vae"]),
                  "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig.from_dict(CONFIG["text_encoder_2"]))}
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert sizes == {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder_2": 694_659_840}
    sites = Counter(site for module in models["unet"].modules() if (site := trace._site(module)))
    assert sites == {"Attention": 140, "GroupNormalization": 46, "LayerNormalization": 210, "Gelu": 70}


def test_operations_of_the_published_model(tmp_path):
    """13.52 TFLOP for two rows of 128x128 latents; 2.989 T multiply-adds a row beside the products of attention."""
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps(CONFIG["unet"]))
    flops = limits.unet_flops(tmp_path, 2, 128, 128)
    attention = 2 * sum(count * 4 * n * (n + 77) * width for count, n, width in ((10, 4096, 640), (60, 1024, 1280)))
    assert round(flops / 1e12, 4) == 13.5225 and round((flops - attention) / 2 / 2 / 1e12, 3) == 2.989
