"""The command line has the options that are declared, and makes of them the requests and settings that they say."""

from __future__ import annotations

import pytest

from runtime import Control, Lora, Request
from runtime.cli.options import parser
from runtime.cli.requests import requests_of, settings_of
from runtime.config import PipelineConfig
from runtime.request.option import options_of

WITHOUT_FLAG = {"prompt", "height", "width", "output", "on_step"}
"""Options of a request that the command line has in another way, or not at all."""


def requested(*words: str) -> Request:
    request, = requests_of(parser().parse_args(["a.bundle", "a cat", *words]))
    return request


def test_every_option_has_a_flag_or_a_reason():
    assert {name for name, one in options_of(Request).items() if not one.flag} == WITHOUT_FLAG
    assert {name for name, one in options_of(PipelineConfig).items() if not one.flag} == {
        "size", "progress", "safety_checker", "depth_estimator"}


def test_help_has_every_flag_with_its_words():
    text = " ".join(parser().format_help().split())
    for cls in (Request, PipelineConfig):
        for declared in options_of(cls).values():
            if declared.flag:
                assert f" {declared.flag}" in text and " ".join(declared.help.split()).replace(" ", "") in \
                    text.replace(" ", ""), declared.flag


@pytest.mark.parametrize(("words", "options"), [
    ([], {}),
    (["--negative", "rain", "--steps", "3", "--guidance", "2.5", "--seed", "7"],
     {"negative_prompt": "rain", "steps": 3, "guidance": 2.5, "seed": 7}),
    (["--size", "64x128"], {"height": 64, "width": 128}),
    (["--timesteps", "9,5,1"], {"timesteps": (9, 5, 1)}),
    (["--lora", "a.safetensors:0.5", "--lora", "b.safetensors", "--loose-loras"],
     {"loras": [Lora("a.safetensors", 0.5, strict=False), Lora("b.safetensors", strict=False)]}),
    (["--embedding", "a=b.safetensors", "--embedding", "c.safetensors"],
     {"embeddings": ("a=b.safetensors", "c.safetensors")}),
    (["--control", "canny=e.png:0.5,end=0.5"], {"control": Control("canny", "e.png", 0.5, end=0.5)}),
    (["--image", "i.png", "--mask", "m.png", "--paste", "--blend", "next"], {"paste": True, "blend": "next"}),
    (["--upscale", "i.png", "--noise-level", "3"], {"task": "upscale", "noise_level": 3}),
    (["--crop", "1,2", "--original-size", "8x9"], {"crop": (1, 2), "original_size": (8, 9)}),
    (["-o", "a.npy"], {"output": "latent"}),
])
def test_words_become_a_request(words, options):
    assert requested(*words) == Request("a cat", **options)


def test_words_become_settings():
    words = ["--backend", "openvino", "--batch", "2", "--eager", "--tile", "512", "--quiet", "--option", "a=1",
             "--option", "b=2", "--attention", "auto"]
    config = settings_of(parser().parse_args(["a.bundle", "a cat", *words]), (64, 128))
    assert config == PipelineConfig("openvino", batch=2, eager=True, tile=512, progress=False, size=(64, 128),
                                    options={"a": "1", "b": "2", "attention": "auto"})
    assert settings_of(parser().parse_args(["a.bundle"]), (8, 8)) == PipelineConfig(size=(8, 8))


def test_several_prompts_are_several_requests():
    requests = requests_of(parser().parse_args(["a.bundle", "a cat", "a dog", "--steps", "3"]))
    assert requests == [Request("a cat", steps=3), Request("a dog", steps=3)]


@pytest.mark.parametrize(("words", "message"), [
    (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
    (["--crop", "3"], "argument --crop: got '3', expected TOP,LEFT"),
    (["--size", "large"], "argument --size: got 'large', expected HEIGHTxWIDTH"),
    (["--timesteps", "1,x"], "argument --timesteps: timesteps: got"),
    (["--lora", "a:b"], "argument --lora: lora: got 'a:b', expected FILE or FILE:SCALE"),
    (["--option", "fp8"], "argument --option: got 'fp8', expected NAME=VALUE"),
    (["--blend", "after"], "argument --blend: invalid choice"),
])
def test_words_that_mean_nothing_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["a.bundle", "a cat", *words])
    assert message in capsys.readouterr().err
