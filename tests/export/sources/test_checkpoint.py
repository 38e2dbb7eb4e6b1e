"""Reading checkpoints: folders, single files in the original layout, and what is neither."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from export import ARCHITECTURES, ExportError
from export.families.family import Family
from export.sources.architectures import shipped
from export.sources.convert import convert
from export.sources.tokenizer import clip_tokenizer, save_tokenizer
from models import tiny
from tests.tools import compvis
from tests.tools.graphs import opened


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("folders")
    return {"sd1": tiny.sd1(where / "sd1"), "sd2": tiny.sd2(where / "sd2", levels=4)}


@pytest.fixture
def folder(folders, tmp_path) -> Path:
    """A copy of the tiny SD 1 folder that a test may damage."""
    return shutil.copytree(folders["sd1"], tmp_path / "model")


def assert_same_weights(got: Family, expected: Family) -> None:
    for name in got.modules:
        a, b = (model.modules[name]().model.state_dict() for model in (got, expected))
        assert a.keys() == b.keys()
        assert [k for k in a if a[k].dtype != torch.float32 or not torch.equal(a[k], b[k])] == []


@pytest.mark.parametrize("ema", [False, True], ids=["plain", "ema"])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_single_file_has_the_weights_of_its_folder(folders, tmp_path, family, suffix, ema):
    state = compvis.from_folder(folders[family])
    path = compvis.save(compvis.with_ema(state) if ema else state, tmp_path / f"model{suffix}")
    assert_same_weights(opened(path, config=folders[family]), opened(folders[family]))


def test_flat_half_precision_pickle(folders, tmp_path):
    state = {k: v.half() if v.is_floating_point() else v for k, v in compvis.from_folder(folders["sd1"]).items()}
    path = compvis.save(state, tmp_path / "model.ckpt", nested=False)
    got = opened(path, config=folders["sd1"]).modules["unet"]().model
    expected = opened(folders["sd1"]).modules["unet"]().model.conv_in.weight
    assert torch.equal(got.conv_in.weight, expected.half().float())


def test_lightning_callbacks_in_a_pickle_are_ignored(folders, tmp_path, monkeypatch):
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    callbacks = {module.ModelCheckpoint: {"best_model_path": "x"}}
    data = {"state_dict": compvis.from_folder(folders["sd1"]), "callbacks": callbacks}
    torch.save(data, tmp_path / "model.ckpt")
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    opened(tmp_path / "model.ckpt", config=folders["sd1"]).modules["vae_decoder"]()


CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
TEXT_KEYS = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("model.diffusion_model.out.2.bias"), "lack conv_out.bias"),
    (lambda s: s.update({"model.diffusion_model.out.9.bias": torch.ones(4)}), r"no counterpart.*out\.9\.bias"),
    (lambda s: s.update({"model.diffusion_model.out.2.bias": torch.ones(5)}), "another shape of conv_out.bias"),
    (lambda s: s.update({"model_ema.diffusion_modelout2bias": torch.ones(4)}), "has EMA weights, but none for"),
    (lambda s: s.update({CONV_IN: torch.ones(32, 6, 3, 3)}), "2 input channels beside"),
], ids=["missing", "unknown", "shape", "partial-ema", "channels"])
def test_single_file_that_does_not_fit(folders, tmp_path, change, message):
    state = compvis.from_folder(folders["sd1"])
    change(state)
    with pytest.raises(ExportError, match=message):
        opened(compvis.save(state, tmp_path / "model.safetensors"), config=folders["sd1"]).modules["unet"]()


SIZES = {  # parameters of the published models
    "sd1": (859_520_964, 83_653_863, 123_060_480),
    "sd2-base": (865_910_724, 83_653_863, 340_387_840),
    "sd2-v": (865_910_724, 83_653_863, 340_387_840),
    "x4": (473_398_020, 55_325_927, 340_387_840),
}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_shipped_configuration_is_that_of_the_published_model(family):
    configs = shipped(family)
    with torch.device("meta"):
        models = {"unet": UNet2DConditionModel.from_config(configs["unet"]),
                  "vae": AutoencoderKL.from_config(configs["vae"]),
                  "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(configs["text_encoder"]))}
    weights = {name: model.state_dict() for name, model in models.items()}
    assert tuple(sum(v.numel() for v in values.values()) for values in weights.values()) == SIZES[family]
    state = compvis.state_dict(*weights.values(), layers_per_block=2, open_clip=family != "sd1")
    for name, expected in weights.items():
        got = {k.removeprefix("text_model."): v.shape for k, v in convert(state, name, configs[name]).items()}
        assert got == {k: v.shape for k, v in expected.items()}


@pytest.mark.parametrize("width, step, channels, family", [
    (768, None, 4, "sd1"), (1024, 875_000, 4, "sd2-base"), (1024, None, 4, "sd2-v"), (768, None, 9, "sd1"),
    (1024, None, 9, "sd2-base"), (1024, None, 5, "sd2-base"), (1024, None, 7, "x4")])
def test_family_is_told_from_the_weights(tmp_path, width, step, channels, family, caplog):
    state = {f"{prefix}x": torch.ones(1) for prefix in ("cond_stage_model.", "first_stage_model.")}
    state |= {CONV_IN: torch.ones(1, channels, 1, 1), TEXT_KEYS: torch.ones(1, width)}
    torch.save({"state_dict": state, "global_step": step}, tmp_path / "model.ckpt")
    model = opened(tmp_path / "model.ckpt")
    assert model.scheduler == shipped(family)["scheduler"]
    assert ("taken for" in caplog.text) == (width == 1024 and channels == 4)
    assert sum(model.extra_channels.values()) == channels - 4


def test_clip_tokenizer(tmp_path):
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49408
    ids = [49406, 320, 8853, 539, 550, 18376, 6765, 320, 4558, 49407]
    assert tokenizer("a photograph of an astronaut riding a horse").input_ids == ids
    assert (tokenizer.pad_token_id, clip_tokenizer("!").pad_token_id) == (49407, 0)
    save_tokenizer(tokenizer, tmp_path / "tokenizer" / "tokenizer.json")


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def bad(folders, tmp_path_factory) -> Path:
    folder, where = folders["sd1"], tmp_path_factory.mktemp("bad")
    whole = compvis.save(compvis.from_folder(folder), where / "whole.safetensors").read_bytes()
    pickled = compvis.save(compvis.from_folder(folder), where / "whole.ckpt").read_bytes()
    contents = {
        "truncated.safetensors": whole[:len(whole) // 2], "truncated.ckpt": pickled[:len(pickled) // 2],
        "text.ckpt": b"a photograph of an astronaut\n", "text.safetensors": b"a photograph of an astronaut\n",
        "empty.ckpt": b"", "empty.safetensors": b"", "image.png": b"\x89PNG", "nothing-there.safetensors": None,
        "code.ckpt": pickle.dumps({"state_dict": Bomb(where / "exploded")}, protocol=2),
    }
    for name, content in contents.items():
        if content is not None:
            (where / name).write_bytes(content)
    with zipfile.ZipFile(where / "zip.ckpt", "w") as file:
        file.writestr("readme.txt", "hello")
    torch.save(Bomb(where / "exploded"), where / "zipped-code.ckpt")
    save_file({"lora_unet_x.lora_up.weight": torch.ones(1)}, where / "lora.safetensors")
    save_file({"conditioner.embedders.0.x": torch.ones(1)}, where / "xl.safetensors")
    torch.save([1, 2], where / "list.ckpt")
    return where


@pytest.mark.parametrize("name, message", [
    ("truncated.safetensors", "not a whole safetensors file"), ("truncated.ckpt", "not a whole checkpoint"),
    ("text.ckpt", "not a whole checkpoint"), ("text.safetensors", "not a whole safetensors file"),
    ("empty.ckpt", "not a whole checkpoint"), ("empty.safetensors", "not a whole safetensors file"),
    ("image.png", r"ends in '\.png', expected"), ("nothing-there.safetensors", "no such file or folder"),
    ("code.ckpt", "refused, loading this pickle would run code"),
    ("zipped-code.ckpt", "refused, loading this pickle would run code"),
    ("zip.ckpt", "not a whole checkpoint"), ("list.ckpt", "got a list"), ("lora.safetensors", "got a LoRA"),
    ("xl.safetensors", "Stable Diffusion XL"),
])
def test_file_that_is_no_checkpoint(bad, name, message):
    with pytest.raises(ExportError, match=message):
        opened(bad / name)
    assert not (bad / "exploded").exists()


def test_folder_with_pickled_weights(folder, folders):
    for name, target in (("unet", "diffusion_pytorch_model.bin"), ("vae", "diffusion_pytorch_model.bin"),
                         ("text_encoder", "pytorch_model.bin")):
        file, = (folder / name).glob("*.safetensors")
        torch.save(load_file(file), folder / name / target)
        file.unlink()
    assert_same_weights(opened(folder), opened(folders["sd1"]))


def test_folder_that_older_versions_wrote(folder, folders):
    """The VAE's projections were called query, key, value and proj_attn, and CLIP's positions were saved."""
    file, = (folder / "vae").glob("*.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(file)
    for new, name in old.items():
        state = {k.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): v for k, v in state.items()}
    save_file(state, file)
    file, = (folder / "text_encoder").glob("*.safetensors")
    state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(file).items()}
    save_file({**state, "text_model.embeddings.position_ids": torch.arange(77)[None]}, file)
    assert_same_weights(opened(folder), opened(folders["sd1"]))


def test_folder_with_only_the_fp16_variant(folder, folders):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v.half() for k, v in load_file(file).items()}, file.with_suffix(".fp16.safetensors"))
    file.unlink()
    got, expected = (opened(path).modules["unet"]().model.conv_in.weight for path in (folder, folders["sd1"]))
    assert torch.equal(got, expected.half().float())


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("damage, message", [
    (lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"), "got a FluxPipeline, expected one of"),
    (lambda f: (f / "model_index.json").unlink(), "not a diffusers folder"),
    (lambda f: (f / "vae" / "config.json").write_text("{"), "could not be read"),
    (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "no weights, expected"),
    (lambda f: os.truncate(f / "unet" / "diffusion_pytorch_model.safetensors", 100_000), "weights could not be read"),
    (lambda f: edit(f / "unet" / "config.json", layers_per_block=2), "do not fit config.json"),
    (lambda f: edit(f / "unet" / "config.json", in_channels=6), "2 input channels beside the 4"),
    (lambda f: edit(f / "unet" / "config.json", num_class_embeds=10), "num_class_embeds=10"),
    (lambda f: edit(f / "scheduler" / "scheduler_config.json", prediction_type="flow"), "prediction_type 'flow'"),
    (lambda f: shutil.rmtree(f / "tokenizer"), "no tokenizer, expected"),
    (lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{}"), "tokenizer could not be read"),
    (lambda f: clip_tokenizer().save_pretrained(f / "tokenizer"), "49408 tokens for a text encoder of 528"),
], ids=["pipeline", "no-index", "bad-json", "no-weights", "truncated", "config", "channels", "class-labels",
        "prediction", "no-tokenizer", "bad-tokenizer", "other-tokenizer"])
def test_folder_that_cannot_be_exported(folder, damage, message):
    damage(folder)
    with pytest.raises(ExportError, match=message):
        opened(folder).modules["unet"]()
