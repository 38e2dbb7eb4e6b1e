"""LoRAs: pictures against diffusers with PEFT, every dialect, exact restore, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders import lora_conversion_utils as conversion
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.numpy import save_file
from torch import nn

import engines
from engines import Bundle, EngineError, Target, store
from engines.check import compare, refit
from engines.onnx.initializers import values
from engines.onnx.low_rank import LowRank
from runtime import Lora, Pipeline, Request
from runtime.lora.application import Loras
from runtime.lora.files import Weights, read_lora, weights_of
from runtime.lora.names import original_names
from tests.tolerances import IMAGE_MAX
from tests.tools import compvis

ATTENTION = r".*attn[12]\.(to_[qkv]|to_out\.0)"
EVERYTHING = (rf"{ATTENTION}|.*ff\.net\.(0\.proj|2)|.*proj_(in|out)|.*(conv1|conv2|conv_shortcut|time_emb_proj)|"
              r"conv_in|conv_out|time_embedding\.linear_[12]|.*(down|up)samplers\.0\.conv")
TEXT = r".*(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
ALPHA = np.array(1.5, np.float32)
REQUEST = Request("a cat and a horse", "rain", seed=7, steps=3, height=64, width=64)


@pytest.fixture(scope="module")
def reference(checkpoints):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(checkpoints["sd1"], safety_checker=None,
                                                             dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def ours(bundles):
    return Pipeline.load(bundles["sd1"], "onnxruntime", size=(64, 64), batch=1, progress=False)


@pytest.fixture(scope="module")
def kohya(reference, tmp_path_factory):
    """Every kind of layer of the UNet and the text encoder in kohya's dialect, with ranks that differ, and one α.

    With several, diffusers takes the most frequent one for most layers.
    """
    return write_kohya(tmp_path_factory.mktemp("loras") / "kohya.safetensors", reference)


def write_kohya(path, pipe):
    tensors = {}
    for prefix, model, pattern in (("lora_unet_", pipe.unet, EVERYTHING), ("lora_te_", pipe.text_encoder, TEXT)):
        for name, (down, up) in pairs(model, pattern, seed=1).items():
            name = name if prefix == "lora_unet_" or name.startswith("text_model.") else f"text_model.{name}"
            key = prefix + name.replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": ALPHA}
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def peft(checkpoints, tmp_path_factory):
    """Attention alone, by PEFT and diffusers' own writer: α is in the metadata, and not the rank."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(checkpoints["sd1"], safety_checker=None)
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_k", "to_v", "to_out.0"],
                                     alpha_pattern={"mid_block.*to_q": 3}), "style")
    generator = torch.Generator().manual_seed(2)
    state = {name: 0.1 * torch.randn(value.shape, generator=generator)
             for name, value in get_peft_model_state_dict(pipe.unet, adapter_name="style").items()}
    folder = tmp_path_factory.mktemp("loras")
    pipe.save_lora_weights(folder, unet_lora_layers=state, unet_lora_adapter_metadata={
        key: sorted(value) if isinstance(value, set) else value
        for key, value in pipe.unet.peft_config["style"].to_dict().items()})
    return folder / "pytorch_lora_weights.safetensors"


def pairs(model: nn.Module, pattern: str, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Layer → (down, up) of random LoRAs that change what it computes by about a fifth."""
    rng = np.random.default_rng(seed)
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and re.fullmatch(pattern, name):
            shape = tuple(module.weight.shape)
            rank = 2 + len(found) % 3
            down = rng.standard_normal((rank, *shape[1:])).astype(np.float32)
            up = rng.standard_normal((shape[0], rank, *(1 for _ in shape[2:]))).astype(np.float32)
            found[name] = down, up * 0.1 * float(module.weight.detach().std())
    return found


def draw_reference(pipe, adapters: dict) -> np.ndarray:
    """What diffusers draws of REQUEST with these files and weights."""
    for n, path in enumerate(adapters):
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=f"a{n}")
    pipe.set_adapters([f"a{n}" for n in range(len(adapters))], list(adapters.values()))
    try:
        return pipe(REQUEST.prompt, negative_prompt=REQUEST.negative_prompt, height=64, width=64,
                    num_inference_steps=REQUEST.steps, guidance_scale=REQUEST.guidance, output_type="np",
                    generator=torch.Generator("cpu").manual_seed(REQUEST.seed)).images
    finally:
        pipe.unload_lora_weights()


def draw(pipe, *loras: Lora) -> np.ndarray:
    return pipe.decode(pipe(dataclasses.replace(REQUEST, loras=loras)).latents)


@pytest.mark.parametrize("scales", [{"kohya": 1.0}, {"peft": 0.8}, {"kohya": 0.7, "peft": -0.4}],
                         ids=["kohya", "peft", "both"])
def test_pictures_are_those_of_diffusers(reference, ours, kohya, peft, scales):
    files = {"kohya": kohya, "peft": peft}
    expected = draw_reference(reference, {files[name]: scale for name, scale in scales.items()})
    found = draw(ours, *(Lora(str(files[name]), scale) for name, scale in scales.items()))
    assert np.abs(found - draw(ours)).max() > 10 * IMAGE_MAX
    np.testing.assert_allclose(found, expected, atol=IMAGE_MAX, rtol=0)
    slightly = draw(ours, *(Lora(str(files[name]), scale * 1.03) for name, scale in scales.items()))
    assert np.abs(slightly - expected).max() > IMAGE_MAX  # the comparison notices a wrong scale


def test_stable_diffusion_xl_as_kohya_writes_it(checkpoints, bundles, tmp_path):
    """The UNet in the original layout's names, and two text encoders, of which the first ends before its last layer."""
    reference = diffusers.StableDiffusionXLPipeline.from_pretrained(checkpoints["sdxl"], dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    names = {layer: name for name, layer in original_names(pairs(reference.unet, ".*", seed=0)).items()}
    tensors = {}
    for seed, (prefix, model, pattern) in enumerate((("unet", reference.unet, EVERYTHING),
                                                     ("te1", reference.text_encoder, TEXT),
                                                     ("te2", reference.text_encoder_2, TEXT))):
        for name, (down, up) in pairs(model, pattern, seed).items():
            spelled = names[name] if prefix == "unet" else f"text_model.{name.removeprefix('text_model.')}"
            key = f"lora_{prefix}_{spelled.replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": ALPHA}
    path = tmp_path / "xl.safetensors"
    save_file(tensors, path)
    ours = Pipeline.load(bundles["sdxl"], "onnxruntime", size=(64, 64), progress=False)
    found = draw(ours, Lora(str(path), 0.9))
    assert np.abs(found - draw(ours)).max() > 10 * IMAGE_MAX
    np.testing.assert_allclose(found, draw_reference(reference, {path: 0.9}), atol=IMAGE_MAX, rtol=0)


def test_stable_diffusion_2(checkpoints, bundles, tmp_path):
    """Projections that are linear layers, heads of 64, and v: every kind of layer again, as kohya writes it."""
    reference = diffusers.StableDiffusionPipeline.from_pretrained(checkpoints["sd2"], safety_checker=None,
                                                                  dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    path = write_kohya(tmp_path / "sd2.safetensors", reference)
    ours = Pipeline.load(bundles["sd2"], "onnxruntime", size=(64, 64), progress=False)
    found = draw(ours, Lora(str(path), 0.9))
    assert np.abs(found - draw(ours)).max() > 10 * IMAGE_MAX
    np.testing.assert_allclose(found, draw_reference(reference, {path: 0.9}), atol=IMAGE_MAX, rtol=0)


def test_text_encoders_may_have_another_scale(ours, kohya, tmp_path):
    tensors = load(kohya)
    unet = write(tmp_path / "unet", {k: v for k, v in tensors.items() if "lora_unet" in k})
    text = write(tmp_path / "text", {k: v for k, v in tensors.items() if "lora_te" in k})
    apart = draw(ours, Lora(unet, 0.6), Lora(text, 0.3))
    np.testing.assert_array_equal(draw(ours, Lora(str(kohya), 0.6, text_scale=0.3)), apart)
    assert np.abs(draw(ours, Lora(unet, 0.6)) - apart).max() > IMAGE_MAX


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_swaps_restore_exactly(bundles, kohya, peft, backend):
    """Base, one, another, and in one call requests of three kinds in turn: each as if it were alone."""
    pipe = Pipeline.load(bundles["sd1"], backend, size=(64, 64), progress=False)
    kinds = [(), (Lora(str(kohya)),), (Lora(str(peft), 0.5), Lora(str(kohya), 0.5))]
    alone = [pipe(dataclasses.replace(REQUEST, loras=loras)).latents for loras in kinds]
    assert all(np.abs(a - alone[0]).max() > 1e-2 for a in alone[1:])
    order = [2, 0, 1, 0, 2]
    for result, kind in zip(pipe([dataclasses.replace(REQUEST, loras=kinds[k]) for k in order]), order, strict=True):
        assert result.request.loras == kinds[kind]
        np.testing.assert_array_equal(result.latents, alone[kind])
    np.testing.assert_array_equal(pipe(REQUEST).latents, alone[0])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_openvino_cuts_new_weights_where_it_cuts_the_old(bundles, dtype):
    """Gates are products with halves of a weight; given other weights in other halves, the output would be another."""
    if dtype not in engines.backend("openvino").dtypes():
        pytest.skip(f"no {dtype} here")
    bundle = Bundle.open(bundles["sd1"])
    config = bundle.config("unet_body", backend="openvino", dtype=dtype, batch=2, size=(64, 64))
    rng, weights = np.random.default_rng(4), {}
    for name, base in values(bundle.path / "unet_body.onnx").items():
        if name.endswith("ff.net.0.proj.weight"):
            up, down = (rng.standard_normal(shape).astype(np.float32) for shape in ((len(base), 2), (2, base.shape[1])))
            weights[name] = LowRank(base, 0.5 * up, down)
    engine = store.load(bundle, "unet_body", config)
    feed = compare.inputs(engine.inputs.values(), 5)
    before = compare.run(engine, feed)["noise_pred"].copy()
    figures = refit.against_reference(engine, Target.of(bundle, "unet_body", config), weights, 5)
    change = compare.run(engine, feed)["noise_pred"] - before
    assert np.sqrt((change**2).mean() / (before**2).mean()) > 10 * figures.rel_rms


def test_only_weights_that_differ_are_refitted(bundles, peft, kohya):
    """Of each component its own; and a swap touches what either of two sets changes."""
    loras, engine = Loras(Bundle.open(bundles["sd1"])), Noted()
    base = values(bundles["sd1"] / "unet_text.onnx")
    stack = loras.read([Lora(str(peft))])
    assert loras.fit("unet_text", engine, stack) is engine and loras.fit("unet_text", engine, stack) is engine
    (first,) = engine.calls
    assert set(first) == set(base) == {name for name in base if re.search(r"attn2\.to_[kv]\.weight", name)}
    for untouched in ("vae_decoder", "text_encoder"):
        assert loras.fit(untouched, Noted(), stack).calls == []
    loras.fit("unet_text", engine, ())
    assert set(engine.calls[1]) == set(first)
    assert all(np.array_equal(engine.calls[1][name], base[name]) for name in first)
    assert not any(np.array_equal(first[name], base[name]) for name in first)
    text = loras.fit("text_encoder", Noted(), loras.read([Lora(str(kohya), text_scale=0.5)]))
    assert len(text.calls) == 1 and all(re.fullmatch(TEXT, name.removesuffix(".weight")) for name in text.calls[0])


def test_an_engine_that_cannot_be_refitted_stays_usable(bundles, peft):
    class Fixed(Noted):
        def refit(self, weights) -> None:
            raise EngineError("this engine keeps its weights")

    loras, engine = Loras(Bundle.open(bundles["sd1"])), Fixed()
    with pytest.raises(EngineError, match="keeps its weights"):
        loras.fit("unet_body", engine, loras.read([Lora(str(peft))]))
    assert loras.fit("unet_body", engine, ()) is engine


class Noted:
    """Stands for an engine, and notes what it is refitted with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, np.ndarray]] = []

    def refit(self, weights) -> None:
        self.calls.append({name: np.asarray(value) for name, value in weights.items()})


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


def load(path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path)


def write(path, tensors) -> str:
    file = f"{path}.safetensors"
    save_file({k: np.asarray(v) for k, v in tensors.items()}, file)
    return file


def to_bfloat16(value: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(value)).to(torch.bfloat16)


def write_bfloat16(path, tensors) -> None:
    from safetensors.torch import save_file as save_torch

    save_torch(tensors, path)
