"""Videos whose frames attend to others are those of diffusers' pipeline with such processors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from PIL import Image

from engines import Bundle, store
from runtime import Control, Pipeline, Request, Step
from runtime.__main__ import main
from runtime.pictures import video
from runtime.request.task import task_of
from runtime.schedulers import SCHEDULERS
from tests.tolerances import BATCH_IMAGE_MAX, IMAGE_MAX, PSNR_16BIT_DB
from tests.tools.drawn import SIZE, picture, request_of

FRAMES = [picture(*SIZE, seed=n) for n in range(4)]
HINTS = [picture(*SIZE, seed=10 + n) for n in range(4)]


class CrossFrame(AttnProcessor2_0):
    """Self-attention with the tokens of the first frame and of the one before in the place of a frame's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[int, torch.Tensor] = {}
        self.previous: dict[int, torch.Tensor] = {}
        self.loading, self.step = False, 0

    def __call__(self, attn: Attention, hidden_states: torch.Tensor,
                 encoder_hidden_states: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        if encoder_hidden_states is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        told = torch.cat([self.first[self.step], self.previous[self.step]], dim=1) if self.loading else None
        out = super().__call__(attn, hidden_states, told, *args, **kwargs)
        self.first.setdefault(self.step, hidden_states)
        self.previous[self.step] = hidden_states
        self.step += 1
        return out


def by_diffusers(pipe: Any, request: Request, frames: list[Image.Image], **options: Any) -> np.ndarray:
    """float32 [n, H, W, 3]: each frame a call of its own, with the seed after that of the one before."""
    crossing = {name: CrossFrame() for name in pipe.unet.attn_processors if name.startswith("up")}
    pipe.unet.set_attn_processor({**pipe.unet.attn_processors, **crossing})
    pipe.set_progress_bar_config(disable=True)
    found, seed = [], request.seed or 0
    for n, frame in enumerate(frames):
        for processor in crossing.values():
            processor.step, processor.loading = 0, n > 0
        here = {name: value[n] if isinstance(value, list) else value for name, value in options.items()}
        found.append(pipe(request.prompt, negative_prompt=request.negative_prompt, image=frame,
                          strength=request.strength, num_inference_steps=request.steps,
                          guidance_scale=request.guidance, output_type="np",
                          generator=torch.Generator("cpu").manual_seed(seed + n), **here).images[0])
    kept = {len(processor.first) for processor in crossing.values()}
    assert kept == {processor.step for processor in crossing.values()} and len(kept) == 2, "not of self-attention alone"
    return np.stack(found)


@pytest.fixture(scope="module")
def ours(controlled: Path) -> Pipeline:
    return Pipeline.load(controlled, "onnxruntime", size=SIZE, progress=False)


def assert_drawn(ours: Pipeline, request: Request, expected: np.ndarray) -> None:
    got = ours.decode(ours(dataclasses.replace(request, output="latent")).latents)
    np.testing.assert_allclose(got, expected, atol=IMAGE_MAX, rtol=0)


@pytest.mark.parametrize("options", [
    {"scheduler": "ddim"}, {"scheduler": "pndm", "strength": 0.9}, {"scheduler": "euler_ancestral", "guidance": 1.0},
    {"scheduler": "heun", "strength": 0.4}], ids=lambda options: options["scheduler"])
def test_frames_are_those_of_diffusers(ours, checkpoints, options):
    """PNDM and Heun call the UNet more often than there are steps: what is kept is of the call, not of the timestep."""
    request = request_of(**{"frames": FRAMES[:3], "strength": 0.6, **options})
    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(checkpoints["sd1"])
    name, overrides = SCHEDULERS[options["scheduler"]]
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **overrides)
    assert_drawn(ours, request, by_diffusers(pipe, request, FRAMES[:3]))


def test_frames_with_a_control_net_are_those_of_diffusers(ours, checkpoints, edge_net):
    request = request_of(frames=FRAMES, strength=0.9, steps=4, scheduler="ddim",
                         control=Control("edge-net", HINTS, scale=0.7))
    pipe = diffusers.StableDiffusionControlNetImg2ImgPipeline.from_pretrained(
        checkpoints["sd1"], controlnet=ControlNetModel.from_pretrained(edge_net))
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    expected = by_diffusers(pipe, request, FRAMES, control_image=HINTS, controlnet_conditioning_scale=0.7)
    assert_drawn(ours, request, expected)
    bare = ours(dataclasses.replace(request, control=())).latents
    assert np.abs(bare - ours(request).latents).max() > 0.05, "the ControlNet does nothing here"
    stills = [ours(request_of(image=frame, strength=0.9, steps=4, scheduler="ddim", seed=3 + n)).latents[0]
              for n, frame in enumerate(FRAMES)]
    apart = np.abs(bare - np.stack(stills)).max(axis=(1, 2, 3))
    assert apart[0] < 1e-4 and apart[1:].min() > 0.01, "the first frame is an image to image, and no other one"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_model_of_another_layout_on_another_engine(checkpoints, bundles, dtype):
    """Linear projections, v-prediction."""
    request = request_of(frames=FRAMES[:3], strength=0.8, steps=4)
    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(checkpoints["sd2"])
    expected = by_diffusers(pipe, request, FRAMES[:3])
    ours = Pipeline.load(bundles["sd2"], "openvino", dtype=dtype, size=SIZE, progress=False)
    if dtype == "fp32":
        assert_drawn(ours, request, expected)
    else:
        got = ours.decode(ours(dataclasses.replace(request, output="latent")).latents)
        noise = 10 * np.log10(1 / np.mean((got - expected) ** 2))
        assert noise > PSNR_16BIT_DB, f"{noise:.1f} dB"


@pytest.mark.parametrize("batch", [2, 4])
def test_in_a_batch_frames_are_those_of_one_after_another(ours, controlled, batch):
    """Two videos and two stills; one with a ControlNet in some of its steps."""
    requests = [request_of(frames=FRAMES[:3], strength=0.8, steps=5), request_of(steps=3, seed=5),
                request_of(frames=FRAMES[1:3], strength=0.6, guidance=1.0, seed=8, scheduler="euler"),
                request_of(steps=4, seed=6, control=Control("edge-net", HINTS[0], start=0.3))]
    wide = Pipeline.load(controlled, "onnxruntime", size=SIZE, batch=batch, progress=False)
    for together, request in zip(wide(requests), requests, strict=True):
        got, alone = (ours.decode(result.latents) for result in (together, ours(request)))
        np.testing.assert_allclose(got, alone, atol=BATCH_IMAGE_MAX, rtol=0)


def test_a_frame_can_be_seen_and_the_rest_cancelled(ours):
    seen: list[int] = []

    def on_step(step: Step) -> bool:
        seen.append(step.image)
        return step.image == 0

    result = ours(request_of(frames=FRAMES[:3], strength=0.5, steps=4, scheduler="ddim", on_step=on_step))
    assert result.cancelled and not result.images and seen == [0, 0, 1]


@pytest.mark.parametrize("options, message", [
    ({"frames": FRAMES, "image": FRAMES[0]}, "image: got one, but video takes none"),
    ({"frames": FRAMES, "mask": FRAMES[0]}, "mask: got one, but video takes none"),
    ({"frames": FRAMES, "count": 2}, "count: got 2 for a video, expected 1"),
    ({"every": 2}, "every: got 2, which text-to-image .* does not have"),
    ({"limit": 2}, "limit: got 2, which text-to-image .* does not have"),
    ({"frames": FRAMES, "latents": np.zeros((4, 8, 16), np.float32)}, "latents: got .* which video .* does not have"),
    ({"frames": FRAMES, "control": Control("edge-net", HINTS[:3])}, "control edge-net: got 3 hints for 4 frames"),
    ({"frames": []}, r"frames: got \[\], in which there is no picture"),
    ({"frames": "nothing.mp4"}, r"frames: nothing\.mp4 is not a video that can be read"),
    ({"frames": "nothing.gif"}, r"frames: nothing\.gif is not a picture or video that can be read"),
], ids=lambda value: "" if isinstance(value, str) else "-".join(value))
def test_what_cannot_be_is_refused(ours, options, message):
    with pytest.raises(ValueError, match=message):
        ours(request_of(**options))


def test_a_bundle_without_the_graph_says_so(controlled):
    bundle = Bundle.open(controlled)
    assert not [name for name in store.used(bundle, "onnxruntime") if "frames" in name], "built at first use alone"
    stills = dataclasses.replace(bundle.manifest, tasks=tuple(t for t in bundle.manifest.tasks if t != "video"))
    with pytest.raises(ValueError, match=r"frames: got a video, expected none: this .* model does text-to-image"):
        task_of(Request("", frames=FRAMES), stills)
    with pytest.raises(ValueError, match="task: got 'video', expected one of text-to-image"):
        task_of(Request("", task="video"), stills)


def test_command_line(controlled, tmp_path, capsys, monkeypatch):
    """A video in, one of the same kind out, which says how to draw it again."""
    video.write(FRAMES, tmp_path / "in.mp4", 10)
    engine = ["--backend", "onnxruntime", "--dtype", "fp32", "--quiet"]
    asked = ["--frames", str(tmp_path / "in.mp4"), "--every", "2", "--steps", "3", "--seed", "1", "--control",
             f"edge-net={tmp_path / 'in.mp4'}:0.5"]
    monkeypatch.chdir(tmp_path)
    reads, read = [], video.read
    with monkeypatch.context() as patch:
        patch.setattr(video, "read", lambda value, *more: reads.append(value) or read(value, *more))
        assert main([str(controlled), "a cat", *engine, *asked]) == 0
    assert reads == [str(tmp_path / "in.mp4")], "frames, hints, rate and names are of one reading"
    out = video.read("latentrt.mp4", "frames")
    assert len(out.frames) == 2 and out.rate == pytest.approx(5) and out.frames[0].size == SIZE[::-1]
    assert main([str(controlled), *engine, "--from", "latentrt.mp4", "-o", "once"]) == 0
    assert main([str(controlled), *engine, "--from", "once", "-o", "twice"]) == 0
    assert len({str(video.metadata(Path(name))["request"]) for name in ("latentrt.mp4", "once", "twice")}) == 1
    for a, b in zip(video.read("once", "frames").frames, video.read("twice", "frames").frames, strict=True):
        assert np.array_equal(a, b)
    capsys.readouterr()
    assert main([str(controlled), "a cat", *engine, *asked]) == 2
    assert "exists; choose another name or pass --force" in capsys.readouterr().err
