"""Requests as JSON, and what holds between their options."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from runtime import Control, Lora, Request
from runtime.request.option import defaults_of, options_of

OTHER: dict[str, Any] = {
    "prompt": "b", "negative_prompt": "c", "prompt_style": "weighted", "embeddings": ("e.safetensors",), "height": 64,
    "width": 128, "steps": 3, "guidance": 2.0, "guidance_rescale": 0.5, "scheduler": "euler", "eta": 0.5,
    "timesteps": (9, 5, 1), "seed": 7, "count": 2, "latents": np.zeros((4, 8, 16)), "loras": ["a.safetensors"],
    "output": "latent", "on_step": print, "task": "inpaint", "image": "i.png", "strength": 0.5, "mask": "m.png",
    "blend": "next", "paste": True, "encoding": "mean", "depth": "d.png", "noise_level": 3, "frames": "f.mp4",
    "every": 2, "limit": 4, "control": Control("canny", "h.png", scale=0.5), "original_size": (8, 9), "crop": (1, 2),
    "target_size": (3, 4), "aesthetic_score": 7.0, "negative_aesthetic_score": 1.0, "denoising_start": 0.25,
    "denoising_end": 0.75}
"""Another value than the default for every option; a new one must be here."""


@pytest.mark.parametrize("name", options_of(Request))
def test_every_option_is_stored_unless_it_cannot_be(name):
    request = Request(**{"prompt": "a", name: OTHER[name]})
    data = json.loads(json.dumps(request.to_json()))
    if name == "on_step":
        assert name not in data
    elif name == "latents":
        assert data[name] is True
    else:
        assert name in data and set(data) <= {"prompt", name}
        again = Request.from_json(data)
        assert again == request and vars(again)[name] == vars(request)[name]


def test_a_request_without_options_stores_its_prompt_only():
    assert Request("a").to_json() == {"prompt": "a"} and Request("a", **defaults_of(Request)) == Request("a")


def test_what_holds_between_options():
    with pytest.raises(ValueError, match=r"latents: got shape \(3, 4, 8, 16\), expected .* each of the 2 images"):
        Request("a", latents=np.zeros((3, 4, 8, 16)), count=2)
    with pytest.raises(ValueError, match="latents: got NaN"):
        Request("a", latents=np.full((4, 8, 16), np.nan))
    assert Request("a", latents=np.zeros((4, 8, 16)), count=2).latents.shape == (2, 4, 8, 16)
    with pytest.raises(ValueError, match="not supported"):
        dataclasses.replace(Request("[a|b]"), prompt_style="weighted")


@pytest.mark.parametrize(("text", "expected"), [
    ("canny=e.png", {}), ("canny=e.png:0.5", {"scale": 0.5}), ("canny=e.png,scale=2", {"scale": 2.0}),
    ("canny=e.png:0.5,start=0.1,end=0.9,preprocessor=canny",
     {"scale": 0.5, "start": 0.1, "end": 0.9, "preprocessor": "canny"}),
])
def test_control_on_the_command_line(text, expected):
    control = Control.parse(text)
    assert control == Control("canny", "e.png", **expected) and control.image == "e.png"


def test_loras_are_told_in_several_ways():
    same = [Lora("a.safetensors", 0.5), {"path": "a.safetensors", "scale": 0.5}, Lora.parse("a.safetensors:0.5")]
    assert len({Request("a", loras=[lora]).loras for lora in same}) == 1
    with pytest.raises(ValueError, match=r"lora: got unknown options .* expected path, scale, text_scale, strict"):
        Request("a", loras=[{"path": "a", "weight": 1}])
