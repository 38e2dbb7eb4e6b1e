"""Textual inversion: files, pictures, and files of other programs that are converted."""

from __future__ import annotations

import logging

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing

from export import ExportError
from export.embedding import convert
from export.embedding import main as convert_main
from runtime import Request
from runtime.__main__ import main
from runtime.config import PipelineConfig
from runtime.networks.shelf import Shelf
from runtime.text.embeddings import load, load_all
from runtime.text.encoders import TextEncoders
from runtime.text.tokenizer import PromptTokenizer
from tests.tolerances import EXPORT_REL_RMS, IMAGE_MAX
from tests.tools import small
from tests.tools.graphs import rel_rms

ONE, TWO = {"text_encoder": 4}, {"text_encoder": 4, "text_encoder_2": 6}
REFINER = {"text_encoder_2": 6}
NAME, WORDS = "<cat-toy>", "a <cat-toy> on the hill"


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

    encode = TextEncoders(Shelf(bundle, PipelineConfig("onnxruntime", "fp32", "cpu", (64, 64))))
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
