"""The upscaler draws what diffusers' pipeline draws."""

from __future__ import annotations

import pytest

from tests.tools.drawn import assert_same, drawn_by, picture, reference, request_of


@pytest.mark.parametrize("level", [20, 250])
def test_upscaler(made, level):
    checkpoint, ours = made("upscaler")
    small = picture(32, 16, seed=1)
    request = request_of(image=small, noise_level=level, seed=9)
    pipe = reference("StableDiffusionUpscalePipeline", checkpoint)
    expected = drawn_by(pipe, request, image=small, noise_level=level)
    assert expected.shape == (1, 128, 64, 3)
    assert_same(ours, request, expected)
