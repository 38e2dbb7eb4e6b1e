"""Weighted prompts, prompts of more than 77 tokens, and textual inversion."""

from __future__ import annotations

import logging
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing

from engines import Bundle, store
from export import ExportError
from export.embedding import convert
from export.embedding import main as convert_main
from runtime import Pipeline, Request
from runtime.__main__ import main
from runtime.devices.bound import BoundEngine
from runtime.text.embeddings import load, load_all
from runtime.text.encoders import TextEncoders
from runtime.text.prompt import LESS, MORE, emphasize, fill, parse
from runtime.text.tokenizer import PromptTokenizer
from tests.tolerances import BATCH_IMAGE_MAX, EXPORT_REL_RMS, IMAGE_MAX
from tests.tools import small
from tests.tools.graphs import rel_rms

LONG = "a cat and a horse on the hill, " * 12 + "and rain"
ONE, TWO = {"text_encoder": 4}, {"text_encoder": 4, "text_encoder_2": 6}
REFINER = {"text_encoder_2": 6}
NAME, WORDS = "<cat-toy>", "a <cat-toy> on the hill"


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def model(request, checkpoints, bundles):
    """(diffusers pipeline, our pipeline) of a tiny random checkpoint; 2.x pads with another token than the end."""
    reference = diffusers.StableDiffusionPipeline.from_pretrained(checkpoints[request.param], safety_checker=None,
                                                                  dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    return reference, Pipeline.load(bundles[request.param], "onnxruntime", size=(64, 64))


@pytest.fixture(scope="module")
def xl(checkpoints, bundles):
    """(diffusers pipeline, our text encoders) of a tiny Stable Diffusion XL."""
    bundle = Bundle.open(bundles["sdxl"])

    def engine(component: str, rows: int) -> BoundEngine:
        config = bundle.config(component, backend="onnxruntime", size=(64, 64), batch=rows)
        return BoundEngine(store.load(bundle, component, config))

    reference = diffusers.StableDiffusionXLPipeline.from_pretrained(checkpoints["sdxl"], dtype=torch.float32)
    return reference, TextEncoders(bundle, engine)


@pytest.mark.parametrize(("prompt", "expected"), [
    ("", [[]]),
    ("a cat", [[("a cat", 1)]]),
    ("a (cat)", [[("a ", 1), ("cat", MORE)]]),
    ("a ((cat))", [[("a ", 1), ("cat", MORE * MORE)]]),
    ("a [cat] b", [[("a ", 1), ("cat", LESS), (" b", 1)]]),
    ("(a:1.3)", [[("a", 1.3)]]),
    ("(a :1.3)(b: .5 )(c:+2)", [[("a ", 1.3), ("b", 0.5), ("c", 2)]]),
    ("(a:0)(b:-1)", [[("a", 0), ("b", -1)]]),
    ("(a (b:2) c:3)", [[("a ", 3), ("b", 6), (" c", 3)]]),
    ("[a (b)]", [[("a ", LESS), ("b", MORE * LESS)]]),
    ("(a)(b)", [[("ab", MORE)]]),
    ("(a) b (c", [[("a", MORE), (" b ", 1), ("c", MORE)]]),
    ("a [b", [[("a ", 1), ("b", LESS)]]),
    ("a) b]", [[("a) b]", 1)]]),
    (r"a \(b\) \[c\] \\", [[("a (b) [c] \\", 1)]]),
    (r"(a\):1.5)", [[("a)", 1.5)]]),
    (r"a\b", [[(r"a\b", 1)]]),
    ("a:1.3", [[("a:1.3", 1)]]),
    ("a:1.3)", [[("a:1.3)", 1)]]),
    ("(a:b)", [[("a:b", MORE)]]),
    ("at 12:30 (sharp:1.2)", [[("at 12:30 ", 1), ("sharp", 1.2)]]),
    ("a BREAK b", [[("a", 1)], [("b", 1)]]),
    ("BREAK a BREAK", [[], [("a", 1)], []]),
    ("BREAKFAST", [[("BREAKFAST", 1)]]),
    ("(a BREAK b:2) c", [[("a", 2)], [("b", 2), (" c", 1)]]),
    ("(a)BREAK(b)", [[("a", MORE)], [("b", MORE)]]),
])
def test_what_a_weighted_prompt_says(prompt, expected):
    got = [[(run.text, pytest.approx(run.weight)) for run in section] for section in parse(prompt)]
    assert got == expected


@pytest.mark.parametrize("prompt", ["[cat:dog:0.5]", "a [cat:10]", "[cat|dog]", "[(cat:1.2):dog:.3]", "cat AND dog"])
def test_what_only_the_web_ui_has_is_refused(prompt):
    with pytest.raises(ValueError, match=r"prompt: got '.*expected words.* not supported"):
        Request(prompt, prompt_style="weighted")
    with pytest.raises(ValueError, match="not supported"):
        Request("a cat", negative_prompt=prompt, prompt_style="weighted")
    assert Request(prompt).prompt == prompt  # text, in the plain style


def units(text: str) -> list[tuple[tuple[int, ...], float]]:
    """Letters as tokens; capitals in a row are one unit."""
    found: list[tuple[int, ...]] = []
    for before, letter in pairwise(f" {text}"):
        if letter.isupper() and before.isupper():
            found[-1] += (ord(letter),)
        else:
            found.append((ord(letter),))
    return [(ids, 1.0) for ids in found]


@pytest.mark.parametrize(("text", "room", "expected"), [
    ("", 4, [""]),
    ("abcd", 4, ["abcd"]),
    ("abcde", 4, ["abcd", "e"]),
    ("ab,cde", 4, ["ab,", "cde"]),  # what follows a comma that is near moves on
    ("abc,de", 4, ["abc,", "de"]),
    ("abcd,e", 4, ["abcd", ",e"]),  # a comma itself does not fit any more
    ("a,b,cd", 4, ["a,b,", "cd"]),
    ("a," + 25 * "b", 24, ["a," + 22 * "b", "bbb"]),  # too far back
    ("a," + 21 * "b", 22, ["a," + 20 * "b", "b"]),
    ("a," + 20 * "b", 21, ["a,", 20 * "b"]),
    ("abcXY", 4, ["abc", "XY"]),  # vectors of one embedding stay together
    ("abXY", 4, ["abXY"]),
])
def test_chunks(text, room, expected):
    got = fill(units(text), room, ord(","))
    assert ["".join(chr(i) for i, _ in chunk) for chunk in got] == expected


def test_weights_keep_the_mean():
    states = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32) + 0.5
    weights = np.array([1, 1.5, 1.5, 0.2, 1, 1, 1], np.float32)
    got = emphasize(states, weights)
    assert got.mean() == pytest.approx(states.mean(), rel=1e-5)
    ratio = got / states
    np.testing.assert_allclose(ratio / ratio[0], np.repeat(weights[:, None], 5, 1), rtol=1e-5)
    centred = states - states.mean()
    np.testing.assert_array_equal(emphasize(centred, weights), centred * weights[:, None])  # there is none to keep
    assert (emphasize(states, np.zeros(7, np.float32)) == 0).all()


def web_ui(reference, ids: list[list[int]], weights: list[list[float]]) -> np.ndarray:
    """Chunks of ids and weights, start, end and padding in them, as the web UI encodes them, in PyTorch."""
    states = []
    for chunk, weight in zip(ids, weights, strict=True):
        with torch.no_grad():
            z = reference.text_encoder(torch.tensor([chunk])).last_hidden_state
        weighted = z * torch.tensor(weight)[None, :, None]
        states.append(weighted * (z.mean() / weighted.mean()))
    return torch.cat(states, 1)[0].numpy()


def test_weights_and_chunks_against_pytorch(model):
    """A prompt of two chunks, the first of them cut at BREAK, and a negative prompt of one that is padded to two."""
    reference, ours = model
    words = reference.tokenizer
    start, end, pad = words.bos_token_id, words.eos_token_id, words.pad_token_id

    def ids(text: str) -> list[int]:
        return words(text, add_special_tokens=False).input_ids

    def chunk(*runs: tuple[str, float]) -> tuple[list[int], list[float]]:
        tokens = [(i, weight) for text, weight in runs for i in ids(text)]
        padding = [(end, 1.0)] + [(pad, 1.0)] * (75 - len(tokens))
        found = [(start, 1.0), *tokens, *padding]
        return [i for i, _ in found], [weight for _, weight in found]

    request = Request("a (cat:1.4) and [the horse] BREAK ((rain)) in the hill", prompt_style="weighted",
                      negative_prompt="(cat:0.6) rain")
    text, = ours.encode([request])
    positive = web_ui(reference, *zip(
        chunk(("a ", 1), ("cat", 1.4), (" and ", 1), ("the horse", LESS)),
        chunk(("rain", MORE * MORE), (" in the hill", 1)), strict=True))
    negative = web_ui(reference, *zip(chunk(("cat", 0.6), (" rain", 1)), chunk(), strict=True))
    assert text.tokens == 154
    assert rel_rms(text.states[1], positive) < EXPORT_REL_RMS["fp32"]
    assert rel_rms(text.states[0], negative) < EXPORT_REL_RMS["fp32"]
    other, = ours.encode([Request("a (cat:1.45) and [the horse] BREAK ((rain)) in the hill", prompt_style="weighted")])
    assert rel_rms(other.states[1], positive) > 10 * EXPORT_REL_RMS["fp32"]


def test_a_long_prompt_is_encoded_whole(model):
    """Chunks of 75 tokens, but where a comma ends one; the web UI's tokens, counted by hand."""
    reference, ours = model
    ids = reference.tokenizer(LONG, add_special_tokens=False).input_ids
    tokenize = PromptTokenizer(ours.bundle.path, ours.bundle.manifest.text[0])
    got, weights = tokenize.chunks(LONG)
    comma = reference.tokenizer.convert_tokens_to_ids(",</w>")
    assert len(got) > 1 and (weights == 1).all() and (got[:, 0] == reference.tokenizer.bos_token_id).all()
    kept = [list(row[1:1 + list(row[1:]).index(reference.tokenizer.eos_token_id)]) for row in got]
    assert [i for row in kept for i in row] == ids
    assert all(55 < len(row) <= 75 and row[-1] == comma for row in kept[:-1])
    assert ours.encode([Request(LONG, prompt_style="weighted")])[0].tokens == 77 * len(got)


def test_pictures_of_long_prompts(model):
    """diffusers draws the same from the text encoded by hand; beside a short prompt in one call, too."""
    reference, ours = model
    requests = [Request(LONG, prompt_style="weighted", negative_prompt="rain", steps=3, seed=5),
                Request("a cat", steps=3, seed=6)]
    together = ours(requests)
    text, _ = ours.encode(requests)
    assert text.tokens > 77
    drawn = reference(prompt_embeds=torch.from_numpy(text.states[1:]), height=64, width=64, num_inference_steps=3,
                      negative_prompt_embeds=torch.from_numpy(text.states[:1]), output_type="np",
                      generator=torch.Generator("cpu").manual_seed(5)).images
    np.testing.assert_allclose(ours.decode(together[0].latents), drawn, atol=IMAGE_MAX, rtol=0)
    for request, result in zip(requests, together, strict=True):
        np.testing.assert_allclose(ours.decode(result.latents), ours.decode(ours(request).latents),
                                   atol=BATCH_IMAGE_MAX, rtol=0)


@pytest.mark.parametrize("style", ["plain", "weighted"])
def test_text_without_weights_is_what_diffusers_encodes(model, xl, style):
    prompts = ["(a cat)", "rain"] if style == "plain" else [r"\(a cat\)", "rain"]
    request = Request(prompts[0], negative_prompt=prompts[1], prompt_style=style)
    for reference, encode in (model[0], model[1].encode), xl:
        got, = encode([request])
        expected, negative, *pooled = reference.encode_prompt(
            "(a cat)", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt="rain")
        assert rel_rms(got.states, torch.cat([negative, expected]).detach().numpy()) < EXPORT_REL_RMS["fp32"]
        if pooled:
            assert rel_rms(got.pooled, torch.cat(pooled[::-1]).detach().numpy()) < EXPORT_REL_RMS["fp32"]
        else:
            assert got.pooled is None


def test_xl_weights_each_encoder_and_leaves_the_pooled_text(xl):
    _, encode = xl
    plain, weighted = (encode([Request(p, prompt_style="weighted")])[0] for p in ("a cat", "a (cat:1.5)"))
    np.testing.assert_array_equal(plain.pooled, weighted.pooled)
    assert plain.states.shape == weighted.states.shape == (2, 77, 80)
    for part in (np.s_[1, :, :32], np.s_[1, :, 32:]):
        np.testing.assert_array_equal(weighted.states[part], emphasize(plain.states[part], np.array(
            [1, 1, 1.5] + [1] * 74, np.float32)))
    long, = encode([Request("a cat BREAK the horse", prompt_style="weighted")])
    np.testing.assert_array_equal(long.pooled, plain.pooled)  # that of the first chunk
    np.testing.assert_array_equal(long.states[1, :77], plain.states[1])


def test_a_negative_prompt_that_is_not_used_adds_no_chunks(model):
    requests = [Request("a cat", negative_prompt=LONG, guidance=guidance, prompt_style="weighted")
                for guidance in (1.0, 7.5)]
    unguided, guided = model[1].encode(requests)
    assert unguided.tokens == 77 < guided.tokens
    np.testing.assert_array_equal(unguided.states[1], guided.states[1, :77])


def test_a_plain_prompt_too_long_says_what_takes_it(model, caplog):
    text, = model[1].encode([Request(LONG)])
    assert text.tokens == 77
    assert "prompt_style 'weighted' takes more in chunks; dropped: " in caplog.text
    assert caplog.text.rstrip().endswith("rain'")


@pytest.fixture(scope="module")
def vectors():
    """Three vectors of the first text encoder's width, and of the second's, as large as a tiny encoder's own are."""
    generator = torch.Generator().manual_seed(0)
    return {width: 0.1 * torch.randn(3, width, generator=generator) for width in (32, 48)}


@pytest.fixture
def width(model):
    return model[0].text_encoder.config.hidden_size


@pytest.mark.parametrize("count", [1, 3])
def test_pictures_with_textual_inversion(model, width, vectors, tmp_path, count):
    """As diffusers draws them, several vectors and both prompts; without the embedding the picture is another."""
    ours, folder = model[1], model[0].config["_name_or_path"]
    save_file({NAME: vectors[width][:count]}, tmp_path / "cat.safetensors")
    reference = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    reference.load_textual_inversion(str(tmp_path), weight_name="cat.safetensors")
    request = Request(WORDS, negative_prompt=f"rain,{NAME}", embeddings=(tmp_path / "cat.safetensors",), steps=3,
                      seed=4)
    expected = reference(WORDS, negative_prompt=request.negative_prompt, height=64, width=64, num_inference_steps=3,
                         generator=torch.Generator("cpu").manual_seed(4), output_type="np").images
    got, without = ours([request, Request(WORDS, negative_prompt=request.negative_prompt, steps=3, seed=4)])
    np.testing.assert_allclose(ours.decode(got.latents), expected, atol=IMAGE_MAX, rtol=0)
    assert np.abs(ours.decode(without.latents) - expected).max() > 10 * IMAGE_MAX
    assert Request.from_json(got.request.to_json()) == got.request


def test_textual_inversion_of_xl(xl, vectors, tmp_path):
    """Both encoders, and the pooled text of the end token."""
    reference, encode = xl
    save_file({"clip_l": vectors[32], "clip_g": vectors[48]}, tmp_path / "s.safetensors")
    request = Request("a <s> cat", negative_prompt="<s>", embeddings=(f"<s>={tmp_path / 's.safetensors'}",))
    for i, key in (("", 32), ("_2", 48)):
        reference.load_textual_inversion({"<s>": vectors[key]}, token="<s>",
                                         text_encoder=getattr(reference, f"text_encoder{i}"),
                                         tokenizer=getattr(reference, f"tokenizer{i}"))
    try:
        expected, negative, *pooled = reference.encode_prompt(
            "a <s> cat", device="cpu", do_classifier_free_guidance=True, negative_prompt="<s>")
    finally:
        for i in ("", "_2"):
            reference.unload_textual_inversion(text_encoder=getattr(reference, f"text_encoder{i}"),
                                               tokenizer=getattr(reference, f"tokenizer{i}"))
    got, = encode([request])
    assert rel_rms(got.states, torch.cat([negative, expected]).detach().numpy()) < EXPORT_REL_RMS["fp32"]
    assert rel_rms(got.pooled, torch.cat(pooled[::-1]).detach().numpy()) < EXPORT_REL_RMS["fp32"]


def test_requests_of_one_call_have_embeddings_of_their_own(model, width, vectors, tmp_path):
    _, ours = model
    for i, name in enumerate(("one", "two")):
        save_file({"emb_params": vectors[width][i:i + 1]}, tmp_path / f"{name}.safetensors")
    one, two = (f"<x>={tmp_path / name}.safetensors" for name in ("one", "two"))
    requests = [Request("a <x>", embeddings=files) for files in ((one,), (two,), (), (one,))]
    texts = ours.encode(requests)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert rel_rms(texts[a].states[1], texts[b].states[1]) > 1e-3
    np.testing.assert_array_equal(texts[0].states, texts[3].states)
    for request, text in zip(requests, texts, strict=True):
        assert rel_rms(ours.encode([request])[0].states, text.states) < 1e-6


def test_an_embedding_is_weighted_and_kept_whole(model, width, vectors, tmp_path):
    _, ours = model
    save_file({NAME: vectors[width]}, tmp_path / "cat.safetensors")
    tokenize = PromptTokenizer(ours.bundle.path, ours.bundle.manifest.text[0])
    ids, weights = tokenize.chunks(f"a ({NAME.upper()}:1.5) b", ((NAME, 3),))  # in any case, as in diffusers
    assert list(ids[0][2:5]) == [-1, -2, -3] and list(weights[0][1:7]) == [1, 1.5, 1.5, 1.5, 1, 1]
    ids, _ = tokenize.chunks("x " * 73 + NAME, ((NAME, 3),))
    assert list(ids[1][1:4]) == [-1, -2, -3] and ids[0][74] == tokenize._end
    assert (tokenize("x " * 73 + NAME, ((NAME, 3),))[74:76] == [-1, -2]).all()  # cut, as diffusers cuts it


def test_an_embedding_in_no_prompt_is_said(model, width, vectors, tmp_path, caplog):
    save_file({NAME: vectors[width]}, tmp_path / "cat.safetensors")
    with caplog.at_level(logging.WARNING):
        model[1].encode([Request("a cat", embeddings=[tmp_path / "cat.safetensors"])])
    assert f"embedding '{NAME}' is in no prompt that is used" in caplog.text


def tensors(**shapes):
    return {name.replace("X", "<x>"): torch.ones(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(("given", "content", "widths", "name", "shapes"), [
    ("f", tensors(X=[4]), ONE, "<x>", [(1, 4)]),
    ("f", tensors(X=[2, 4]), ONE, "<x>", [(2, 4)]),
    ("f", tensors(emb_params=[2, 4]), ONE, "f", [(2, 4)]),
    ("<n>=f", tensors(X=[2, 4]), ONE, "<n>", [(2, 4)]),
    ("f", tensors(clip_g=[2, 6], clip_l=[2, 4]), TWO, "f", [(2, 4), (2, 6)]),
    ("f", tensors(text_encoders_0=[4], text_encoders_1=[6]), TWO, "f", [(1, 4), (1, 6)]),
    ("f", tensors(clip_l=[2, 4], clip_g=[2, 6]), REFINER, "f", [(2, 6)]),
    ("f", {"<x>": torch.ones(2, 4, dtype=torch.bfloat16)}, ONE, "<x>", [(2, 4)]),
    ("f", {"<x>": torch.ones(2, 4, dtype=torch.float16)}, ONE, "<x>", [(2, 4)]),
])
def test_files_of_textual_inversion(tmp_path, given, content, widths, name, shapes):
    save_file(content, tmp_path / "f.safetensors")
    prefix, equals, _ = given.rpartition("=")
    found = load(f"{prefix}{equals}{tmp_path / 'f.safetensors'}", widths)
    assert (found.name, [v.shape for v in found.vectors], found.count) == (name, shapes, shapes[0][0])
    assert all(v.dtype == np.float32 and (v == 1).all() for v in found.vectors)


@pytest.mark.parametrize(("content", "widths", "message"), [
    (tensors(X=[2, 5]), ONE, r"got <x> of shape \(2, 5\), expected \[2, 4\]"),
    (tensors(X=[2, 2, 4]), ONE, "of shape"),
    (tensors(X=[4], Y=[4]), ONE, "got 2 tensors .*expected one tensor"),
    (tensors(clip_l=[4], clip_g=[6]), ONE, "expected one tensor; it was trained for another kind of model"),
    (tensors(X=[4]), TWO, "expected clip_l and clip_g"),
    (tensors(X=[6]), REFINER, "expected clip_l and clip_g"),
    (tensors(clip_l=[4], clip_g=[6], X=[4]), TWO, "got 3 tensors"),
    (tensors(clip_l=[2, 4], clip_g=[3, 6]), TWO, "of shape"),
    ({"<x>": torch.ones(4, dtype=torch.int32)}, ONE, "floating-point tensors"),
    (b"no file of this kind", ONE, "not a safetensors file"),
])
def test_files_that_are_none(tmp_path, content, widths, message):
    file = tmp_path / "f.safetensors"
    file.write_bytes(content) if isinstance(content, bytes) else save_file(content, file)
    with pytest.raises(ValueError, match=message):
        load(file, widths)


def test_embeddings_that_cannot_be_used_together(tmp_path):
    save_file({"<x>": torch.ones(3, 4)}, tmp_path / "a.safetensors")
    a = str(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="got two named '<x>'"):
        load_all([a, f"<X>={a}"], ONE, 75)
    with pytest.raises(ValueError, match="got 3 vectors in '<x>', expected at most 2"):
        load_all([a], ONE, 2)
    with pytest.raises(ValueError, match=r"f.pt: got a file that ends in '.pt'.*python -m export.embedding"):
        (tmp_path / "f.pt").touch()
        load(tmp_path / "f.pt", ONE)
    with pytest.raises(ValueError, match="which is no file, expected FILE or NAME=FILE"):
        load("nowhere.safetensors", ONE)


def test_a_word_of_the_model_is_no_name(model, width, vectors, tmp_path):
    save_file({"th": vectors[width]}, tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match="got the name 'th', which is a token of the model already"):
        model[1].encode([Request("the th", embeddings=(str(tmp_path / "f.safetensors"),))])


@pytest.mark.parametrize(("options", "message"), [
    ({"prompt_style": "webui"}, "prompt_style: got 'webui', expected one of plain, weighted"),
    ({"embeddings": "one.safetensors"}, "embeddings: got 'one.safetensors', expected a list"),
    ({"embeddings": [3]}, "expected a list of FILE or NAME=FILE"),
])
def test_requests_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Request("a cat", **options)


def test_a_bundle_from_before_textual_inversion(tmp_path):
    """Its text encoder has no input for vectors: plain and weighted prompts work, and embeddings say what to do."""
    bundle = small.small_bundle(tmp_path / "small")
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(["<", ">", "a", "b"])}, unk_token="a"))
    words.post_processor = TemplateProcessing(single="< $A >", special_tokens=[("<", 0), (">", 1)])
    (bundle.path / "tokenizer").mkdir()
    words.save(str(bundle.path / "tokenizer" / "tokenizer.json"))

    def engine(component: str, rows: int) -> BoundEngine:
        return BoundEngine(store.load(bundle, component, bundle.config(
            component, backend="onnxruntime", size=(64, 64), batch=rows)))

    encode = TextEncoders(bundle, engine)
    assert encode([Request("a BREAK b", prompt_style="weighted")])[0].states.shape == (2, 154, 32)
    with pytest.raises(ValueError, match="an older version exported it; export it again"):
        encode([Request("a", embeddings=("f.safetensors",))])


class Harmful:
    def __reduce__(self):
        return print, ("loaded",)


@pytest.mark.parametrize(("content", "name", "expected"), [
    ({"<x>": torch.ones(4)}, None, {"<x>": (1, 4)}),
    ({"<x>": torch.ones(2, 4)}, "<y>", {"<y>": (2, 4)}),
    ({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 4)}, "name": "z", "step": 9}, None,
     {"z": (2, 4)}),
    ({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": torch.nn.ParameterDict({"*": torch.ones(2, 4)})},
     None, {"f": (2, 4)}),
    ({"clip_l": torch.ones(2, 4), "clip_g": torch.ones(2, 6)}, None, {"clip_l": (2, 4), "clip_g": (2, 6)}),
], ids=["diffusers", "named", "web-ui", "parameters", "xl"])
def test_pickles_are_converted(tmp_path, content, name, expected):
    torch.save(content, tmp_path / "f.pt")
    found = convert(tmp_path / "f.pt", tmp_path / "out" / "f.safetensors", name)
    assert {key: tuple(value.shape) for key, value in found.items()} == expected
    widths = ONE if len(expected) == 1 else TWO
    embedding = load(tmp_path / "out" / "f.safetensors", widths)
    assert embedding.name == (next(iter(expected)) if len(widths) == 1 else "f")
    assert all((v == 1).all() for v in embedding.vectors)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["f.safetensors"]


@pytest.mark.parametrize(("content", "message"), [
    ({"<x>": Harmful()}, "loading this pickle would run code"),
    ({"state_dict": {"w": torch.ones(4)}}, "got state_dict, expected one word and its vectors"),
    ({"a": torch.ones(4), "b": torch.ones(4)}, "it is no textual inversion"),
    ([torch.ones(4)], "got a list"),
])
def test_pickles_that_are_refused(tmp_path, content, message, capsys):
    torch.save(content, tmp_path / "f.bin")
    with pytest.raises(ExportError, match=message):
        convert(tmp_path / "f.bin", tmp_path / "f.safetensors")
    assert convert_main([str(tmp_path / "f.bin"), "-o", str(tmp_path / "f.safetensors")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and "loaded" not in captured.out
    assert not (tmp_path / "f.safetensors").exists()


def test_the_command_line_takes_both(bundles, vectors, tmp_path):
    torch.save({"<x>": vectors[32]}, tmp_path / "x.pt")
    assert convert_main([str(tmp_path / "x.pt"), "-o", str(tmp_path / "x.safetensors")]) == 0
    options = ["--backend", "onnxruntime", "--size", "64x64", "--steps", "2", "--seed", "1", "--quiet",
               "--prompt-style", "weighted", "--embedding", str(tmp_path / "x.safetensors")]
    for prompt, file in ("a (<x>:1.2) BREAK b", "one.png"), ("a (<x>:1.3) BREAK b", "two.png"):
        assert main([str(bundles["sd1"]), prompt, *options, "-o", str(tmp_path / file)]) == 0
    assert main([str(bundles["sd1"]), "--from", str(tmp_path / "one.png"), "--backend", "onnxruntime", "--quiet",
                 "-o", str(tmp_path / "again.png")]) == 0
    one, two, again = (Image.open(tmp_path / f"{name}.png").tobytes() for name in ("one", "two", "again"))
    assert one == again != two
