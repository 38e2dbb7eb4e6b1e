"""The text of requests is what PyTorch encodes: weights, chunks, several encoders."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runtime import Request
from runtime.text.prompt import LESS, MORE, emphasize
from runtime.text.tokenizer import PromptTokenizer
from tests.tolerances import BATCH_IMAGE_MAX, EXPORT_REL_RMS, IMAGE_MAX
from tests.tools.graphs import rel_rms

LONG = "a cat and a horse on the hill, " * 12 + "and rain"


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
