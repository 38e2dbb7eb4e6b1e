"""LoRA files: every dialect, names of layers, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders import lora_conversion_utils as conversion
from safetensors.numpy import save_file
from torch import nn

from engines import Bundle
from runtime import Lora, Request
from runtime.lora.application import Loras
from runtime.lora.files import Weights, read_lora, weights_of
from runtime.lora.names import original_names
from tests.cases.lora import ATTENTION, REQUEST, Noted, load, to_bfloat16, write, write_bfloat16
from tests.tools import compvis


@pytest.mark.parametrize("kind", ["diffusers", "attention processors", "peft", "original", "half precision"])
def test_other_dialects_say_the_same(bundles, kohya, tmp_path, kind):
    models = weights_of(Bundle.open(bundles["sd1"]))
    expected = read_lora(kohya, models)
    assert not expected.unmatched and len(expected.pairs["unet"]) > 60 and len(expected.pairs["text_encoder"]) == 18
    names = {k.removesuffix(".weight").replace(".", "_"): k.removesuffix(".weight") for k in models["unet"].shapes}
    spelled = {}
    for key, value in load(kohya).items():
        layer, role = key.split(".", 1)
        name = names.get(layer.removeprefix("lora_unet_"), "")
        if not name:
            name = models["text_encoder"].spellings[layer.removeprefix("lora_te_")].removesuffix(".weight")
        prefix = "unet" if "lora_unet" in layer else "text_encoder"
        spelled[respell(kind, prefix, name, key, role)] = to_bfloat16(value) if kind == "half precision" else value
    path = tmp_path / "spelled.safetensors"
    if kind == "half precision":
        write_bfloat16(path, spelled)
    else:
        save_file(spelled, path)
    found = read_lora(path, models)
    assert not found.unmatched and found.pairs.keys() == expected.pairs.keys()
    for model, layers in expected.pairs.items():
        assert found.pairs[model].keys() == layers.keys()
        for name, pair in layers.items():
            got = found.pairs[model][name]
            tolerance = 2**-8 if kind == "half precision" else 0
            np.testing.assert_allclose(got.down, pair.down, rtol=tolerance)
            np.testing.assert_allclose(got.factor * got.up, pair.factor * pair.up, rtol=2 * tolerance)


def respell(kind: str, prefix: str, name: str, key: str, role: str) -> str:
    half = {"lora_down.weight": "down", "lora_up.weight": "up"}.get(role)
    if kind == "half precision":
        return key
    if kind == "original" and prefix == "unet":
        return f"lora_unet_{compvis._unet_name(f'{name}.weight', 1).removesuffix('.weight').replace('.', '_')}.{role}"
    if kind == "original":
        return key.replace("lora_te_", "lora_te1_")
    if not half:
        return f"{prefix}.{name}.alpha"
    if kind == "attention processors" and re.fullmatch(ATTENTION, name):
        block, _, layer = name.removesuffix(".0").rpartition(".")
        return f"{prefix}.{block}.processor.{layer}_lora.{half}.weight"
    if kind == "peft":
        return f"{prefix}.{name}.lora_{'A' if half == 'down' else 'B'}.default.weight"
    return f"{prefix}.{name}.{'lora' if prefix == 'unet' else 'lora_linear_layer'}.{half}.weight"


def test_names_of_the_original_layout_are_those_that_diffusers_reads():
    """Every layer of a UNet of XL's structure, as kohya writes it, through diffusers' own conversion and back."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            layers_per_block=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(32, 64, 64),
            norm_num_groups=8, cross_attention_dim=16, attention_head_dim=8, transformer_layers_per_block=[1, 2, 3],
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64)
    layers = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    original = original_names(layers)
    assert sorted(original.values()) == sorted(layers)
    one = torch.zeros(1)
    for name, layer in original.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        mapped = conversion._maybe_map_sgm_blocks_to_diffusers({f"{key}.lora_down.weight": one}, unet.config)
        (down,) = mapped
        state, _ = conversion._convert_non_diffusers_lora_to_diffusers(
            {down: one, down.replace("lora_down", "lora_up"): one})
        read = {re.sub(r"(_lora|\.lora)\.(down|up)\.weight", "", k).removeprefix("unet.").replace("processor.", "")
                for k in state}
        assert read == {re.sub(r"to_out\.0$", "to_out", layer)}


def test_a_text_layer_that_the_graph_leaves_out_is_no_error(tmp_path):
    """XL's first encoder ends before its last layer, which every file for it has."""
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    models = {"unet": Weights({}, {}),
              "text_encoder": Weights({name: (4, 2)}, {name.removesuffix(".weight").replace(".", "_"): name},
                                      ("text_model_encoder_layers_1_",))}
    half = {"lora_down.weight": np.ones((1, 2), np.float32), "lora_up.weight": np.ones((4, 1), np.float32)}
    path = tmp_path / "lora.safetensors"
    save_file({f"lora_te1_text_model_encoder_layers_{n}_mlp_fc1.{role}": v for n in (0, 1) for role, v in half.items()},
              path)
    found = read_lora(path, models)
    assert not found.unmatched and set(found.pairs["text_encoder"]) == {name}


DOWN, UP = np.ones((2, 32), np.float32), np.ones((32, 2), np.float32)
QUERY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
GOOD = {f"{QUERY}.lora_A.weight": np.ones((2, 64), np.float32), f"{QUERY}.lora_B.weight": np.ones((64, 2), np.float32)}


@pytest.mark.parametrize(("tensors", "message"), [
    ({**GOOD, "unet.nothing.to_q.lora_A.weight": DOWN}, r"1 keys that fit no weight.*unet\.nothing.*strict=False"),
    ({"lora_unet_x.lora_down.weight": DOWN}, "1 keys that fit no weight"),
    ({f"{QUERY}.lora_A.weight": DOWN, f"{QUERY}.lora_B.weight": UP}, r"\[2, 32\].*for a weight of \[64, 64\]"),
    ({f"{QUERY}.lora_A.weight": GOOD[f"{QUERY}.lora_A.weight"]}, "without up"),
    ({**GOOD, f"{QUERY}.lora.down.weight": GOOD[f"{QUERY}.lora_A.weight"]}, "expected one of them"),
    ({**GOOD, f"{QUERY}.alpha": np.float32(np.nan)}, "NaN or infinite"),
    ({**GOOD, f"{QUERY}.lora_B.bias": np.ones(64, np.float32)}, "a LoRA of biases"),
    ({**GOOD, f"{QUERY}.lora_magnitude_vector": UP}, "DoRA"),
    ({"lora_unet_a.hada_w1_a": UP}, "LoHa"),
    ({"lora_unet_a.lokr_w1": UP}, "LoKr"),
    ({"lora_unet_a.lora_mid.weight": UP}, "decomposed"),
    ({"lora_unet_a.dora_scale": UP}, "DoRA"),
    ({"lora_unet_a.oft_blocks": UP}, "OFT"),
    ({"lora_unet_a.diff": UP}, "whole differences"),
], ids=["unmatched", "unknown", "shape", "half", "twice", "nan", "bias", "dora", "loha", "lokr", "tucker", "dora-kohya",
        "oft", "diff"])
def test_files_that_do_not_fit_are_refused(bundles, tmp_path, tensors, message):
    loras = Loras(Bundle.open(bundles["sd1"]))
    with pytest.raises(ValueError, match=message):
        loras.read([Lora(write(tmp_path / "lora", tensors))])


def test_unmatched_keys_can_be_left_out(bundles, tmp_path):
    path = write(tmp_path / "lora", {**GOOD, "unet.nothing.to_q.lora_A.weight": DOWN})
    loras, engine = Loras(Bundle.open(bundles["sd1"])), Noted()
    loras.fit("unet", engine, loras.read([Lora(path, strict=False)]))
    assert [name.removesuffix(".weight") for name in engine.calls[0]] == [QUERY.removeprefix("unet.")]
    with pytest.raises(ValueError, match="no weight of this"):
        loras.read([Lora(write(tmp_path / "none", {"unet.nothing.to_q.lora_A.weight": DOWN}), strict=False)])


def test_what_is_no_lora_file_is_refused_before_any_work(ours, tmp_path):
    fail = dataclasses.replace(REQUEST, on_step=lambda step: pytest.fail("work was done"))
    for name, content in (("missing", None), ("text", b"not a file of tensors"), ("short", b"\x08" + bytes(7) + b"{}")):
        path = tmp_path / f"{name}.safetensors"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.safetensors"):
            ours([fail, dataclasses.replace(REQUEST, loras=[str(path)])])
    good = write(tmp_path / "good", GOOD)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "good.safetensors").read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"cut\.safetensors: got a file that cannot be read"):
        ours(dataclasses.replace(REQUEST, loras=[str(cut)]))
    assert ours(dataclasses.replace(REQUEST, loras=[good])).request.loras == (Lora(good),)


def test_requests_keep_their_loras_in_json():
    request = Request("a cat", loras=["a.safetensors", Lora("b.safetensors", 0.5, text_scale=0.25, strict=False)])
    data = json.loads(json.dumps(request.to_json()))
    assert data["loras"] == [{"path": "a.safetensors"}, {"path": "b.safetensors", "scale": 0.5, "text_scale": 0.25,
                                                         "strict": False}]
    assert Request.from_json(data) == request and "loras" not in Request("a cat").to_json()


@pytest.mark.parametrize(("options", "message"), [
    ({"scale": float("nan")}, "scale: got nan"),
    ({"scale": True}, "scale: got True"),
    ({"text_scale": "1"}, "text_scale: got '1'"),
    ({"path": ""}, "expected the path"),
    ({"strict": 1}, "strict: got 1"),
    ({"weight": 1}, "weight"),
], ids=["nan", "bool", "text", "empty", "strict", "unknown"])
def test_impossible_loras_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Request.from_json({"prompt": "a cat", "loras": [{"path": "a", **options}]})
    with pytest.raises(ValueError, match="expected a list"):
        Request.from_json({"prompt": "a cat", "loras": "a.safetensors"})


def test_command_line_spelling(tmp_path):
    with pytest.raises(ValueError, match="FILE or FILE:SCALE"):
        Lora.parse("a:b")
    assert Lora.parse("a.safetensors") == Lora("a.safetensors")
    assert Lora.parse("C:/a.safetensors:-0.5") == Lora("C:/a.safetensors", -0.5)
    odd = tmp_path / "a:b"
    odd.touch()
    assert Lora.parse(str(odd)) == Lora(str(odd))
