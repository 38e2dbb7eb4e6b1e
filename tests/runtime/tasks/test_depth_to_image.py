"""Depth to image draws what diffusers' pipeline draws."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from runtime import Pipeline
from tests.tools.drawn import DEPTH, IMAGE, SIZE, assert_same, drawn_by, reference, request_of


@pytest.mark.parametrize("scheduler", [None, "euler"])
def test_depth(made, scheduler):
    checkpoint, ours = made("depth")
    request = request_of(image=IMAGE, depth=DEPTH, strength=0.7, scheduler=scheduler)
    pipe = reference("StableDiffusionDepth2ImgPipeline", checkpoint, scheduler)
    assert_same(ours, request, drawn_by(pipe, request, image=IMAGE, depth_map=torch.from_numpy(DEPTH)[None],
                                        strength=0.7))


def test_a_depth_estimator_is_asked_where_no_depth_is_given(made):
    _, ours = made("depth")
    seen = []

    def estimate(image):
        seen.append(image.size)
        return DEPTH

    with_hook = Pipeline.load(ours.bundle.path, "onnxruntime", size=SIZE, progress=False, depth_estimator=estimate)
    request = request_of(image=IMAGE, steps=2)
    expected = ours(dataclasses.replace(request, depth=DEPTH)).latents
    np.testing.assert_array_equal(with_hook(request).latents, expected)
    assert seen == [SIZE[::-1]]
