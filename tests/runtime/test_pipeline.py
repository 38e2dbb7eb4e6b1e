"""Pictures of the runtime against the diffusers pipeline: same weights, same seeds, fp32."""

import dataclasses
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch

from runtime import Pipeline, Request
from runtime.schedulers import SCHEDULERS
from tests.tolerances import BATCH_IMAGE_MAX, IMAGE_MAX

PROMPTS = ["a cat and a horse", "the thing, on a hill", ""]
NEGATIVE = "rain"
SAMPLERS = ["ddim", "pndm", "euler", "euler_ancestral", "dpm++_2m_karras", "unipc", "lcm", "ddpm", "heun",
            "dpm++_2m_sde"]


@pytest.fixture(scope="module", params=["sd1", "sd2", "shapes"])
def model(request, checkpoints, bundles):
    """(diffusers pipeline, our pipeline) of a tiny random checkpoint, or of the model that ships."""
    reference = diffusers.StableDiffusionPipeline.from_pretrained(checkpoints[request.param], safety_checker=None,
                                                                  dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    return reference, Pipeline.load(bundles[request.param], "onnxruntime", size=(64, 128), batch=1)


def draw_reference(pipe, requests):
    """float32 [n, H, W, 3] that diffusers draws for requests which differ in prompt and seed only."""
    first = requests[0]
    own = pipe.scheduler
    if first.scheduler:
        short, karras, _ = first.scheduler.partition("_karras")
        name, overrides = SCHEDULERS[short]
        overrides = {**overrides, "use_karras_sigmas": True} if karras else overrides
        pipe.scheduler = getattr(diffusers, name).from_config(own.config, **overrides)
    try:
        return pipe([r.prompt for r in requests], negative_prompt=[r.negative_prompt for r in requests],
                    height=first.height, width=first.width, num_inference_steps=first.steps,
                    guidance_scale=first.guidance, guidance_rescale=first.guidance_rescale, eta=first.eta,
                    generator=[torch.Generator("cpu").manual_seed(r.seed) for r in requests], output_type="np").images
    finally:
        pipe.scheduler = own


def draw(pipe, requests):
    return np.concatenate([pipe.decode(result.latents) for result in pipe(requests)])


def requests_of(prompts, **options):
    defaults = {"negative_prompt": NEGATIVE, "steps": 6, "height": 64, "width": 128}
    return [Request(p, seed=7 + 100 * i, **{**defaults, **options}) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_every_sampler_draws_what_diffusers_draws(model, scheduler):
    reference, ours = model
    requests = requests_of(PROMPTS[:1], scheduler=scheduler)
    np.testing.assert_allclose(draw(ours, requests), draw_reference(reference, requests), atol=IMAGE_MAX, rtol=0)


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("count", [1, 3], ids=["one", "three"])
@pytest.mark.parametrize("size", [(64, 64), (128, 64), (64, 128)], ids=["64x64", "128x64", "64x128"])
def test_sizes_batches_and_guidance(model, size, count, guidance):
    reference, ours = model
    requests = requests_of(PROMPTS[:count], height=size[0], width=size[1], guidance=guidance)
    np.testing.assert_allclose(draw(ours, requests), draw_reference(reference, requests), atol=IMAGE_MAX, rtol=0)


@pytest.mark.parametrize("options", [{"eta": 0.7, "scheduler": "ddim"}, {"guidance_rescale": 0.6}, {"steps": 1},
                                     {"steps": 11}], ids=["eta", "rescale", "1-step", "11-steps"])
def test_options(model, options):
    reference, ours = model
    requests = requests_of(PROMPTS[:1], **options)
    np.testing.assert_allclose(draw(ours, requests), draw_reference(reference, requests), atol=IMAGE_MAX, rtol=0)


def test_the_comparison_notices_a_wrong_guidance(model):
    """The mutation that must fail: two per cent more guidance is outside the tolerance."""
    reference, ours = model
    asked = requests_of(PROMPTS[:1])
    wrong = [dataclasses.replace(r, guidance=r.guidance * 1.02) for r in asked]
    assert np.abs(draw(ours, wrong) - draw_reference(reference, asked)).max() > IMAGE_MAX


def test_a_request_alone_and_in_a_batch_of_different_ones(model, bundles):
    """Members differ in steps, guidance, sampler, size and seed, and enter and leave the two slots at any step."""
    _, ours = model
    requests = [
        Request(PROMPTS[0], seed=1, steps=9, scheduler="euler_ancestral"),
        Request(PROMPTS[1], seed=2, steps=3, guidance=1.0),
        Request(PROMPTS[0], seed=3, steps=5, guidance=3.0, scheduler="unipc", count=2),
        Request(PROMPTS[1], seed=4, steps=4, height=128, width=64),
        Request(PROMPTS[1], seed=5, steps=4, scheduler="heun", negative_prompt="cat"),
    ]
    batched = Pipeline.load(ours.bundle.path, "onnxruntime", size=(64, 128), batch=2)
    for alone, together in zip([ours(r) for r in requests], batched(requests), strict=True):
        np.testing.assert_allclose(ours.decode(together.latents), ours.decode(alone.latents), atol=BATCH_IMAGE_MAX,
                                   rtol=0)


def test_image_i_of_a_request_uses_seed_plus_i(model):
    _, ours = model
    both = ours(Request(PROMPTS[0], seed=40, steps=3, count=2))
    second = ours(both.request_of(1))
    assert second.request.seed == 41
    np.testing.assert_array_equal(both.latents[1], second.latents[0])


def test_latents_in_and_out(model):
    """Noise given by hand starts the same picture as its seed; output='latent' does not decode."""
    _, ours = model
    factor = ours.bundle.manifest.latent.factor
    seeded = ours(Request(PROMPTS[0], seed=3, steps=3))
    noise = torch.randn((1, 4, 64 // factor, 128 // factor), generator=torch.Generator("cpu").manual_seed(3)).numpy()
    given = ours(Request(PROMPTS[0], latents=noise, seed=99, steps=3, output="latent"))
    assert given.images == () and given.latents.shape == noise.shape
    np.testing.assert_allclose(given.latents, seeded.latents, atol=1e-4)


def test_callbacks_see_every_step_and_can_stop(model):
    _, ours = model
    seen = []

    def watch(step):
        seen.append((step.step, step.steps, step.timestep, step.preview().size))
        return step.step < 3

    stopped = ours(Request(PROMPTS[0], seed=1, steps=5, scheduler="ddim", on_step=watch))
    assert [s[:2] for s in seen] == [(1, 5), (2, 5), (3, 5)]
    assert seen[0][2] > seen[1][2] and seen[0][3] == (128, 64)
    assert stopped.cancelled and stopped.images == ()


def test_an_exception_in_a_callback_leaves_the_pipeline_usable(model):
    _, ours = model
    expected = ours(Request(PROMPTS[1], seed=8, steps=3)).latents

    def fail(step):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        ours(Request(PROMPTS[0], seed=1, steps=3, on_step=fail))
    np.testing.assert_array_equal(ours(Request(PROMPTS[1], seed=8, steps=3)).latents, expected)


@pytest.mark.parametrize(("options", "message"), [
    ({"prompt": 3}, "prompt: got int, expected a string"),
    ({"prompt": ["a", "b"]}, "list of Requests"),
    ({"steps": 0}, "steps: got 0"),
    ({"steps": -4}, "steps: got -4"),
    ({"steps": 2.5}, "steps: got 2.5"),
    ({"seed": -1}, "seed: got -1"),
    ({"seed": 2**64}, "seed: got"),
    ({"seed": 2**64 - 1, "count": 2}, "seed: got"),
    ({"guidance": float("nan")}, "guidance: got nan"),
    ({"guidance_rescale": 1.5}, "guidance_rescale: got 1.5"),
    ({"count": 0}, "count: got 0"),
    ({"output": "jpeg"}, "output: got 'jpeg'"),
    ({"timesteps": (1, 500)}, "timesteps: got"),
    ({"latents": np.zeros((4, 8))}, "latents: got shape"),
])
def test_impossible_requests_are_refused(options, message):
    with pytest.raises(ValueError, match="^.*" + message.replace("(", r"\(")):
        Request(**{"prompt": "a cat", **options})


@pytest.mark.parametrize(("options", "message"), [
    ({"height": 100}, "expected multiples of"),
    ({"width": 8}, "expected multiples of"),
    ({"scheduler": "eulr"}, "eulr"),
    ({"scheduler": "euler", "eta": 0.5}, "eta"),
    ({"steps": 5000}, "steps"),
    ({"latents": np.zeros((4, 5, 5))}, "expected \\(4, "),
])
def test_requests_the_model_cannot_honour_are_refused_before_any_work(model, options, message):
    _, ours = model
    with pytest.raises(ValueError, match=message):
        ours([Request("a cat", steps=2, on_step=lambda step: pytest.fail("work was done")),
              Request(**{"prompt": "a cat", **options})])


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="stepz"):
        Request("a cat", stepz=3)
    with pytest.raises(ValueError, match="stepz"):
        Request.from_json({"prompt": "a cat", "stepz": 3})


def test_long_prompts_are_cut_with_a_warning(model, caplog):
    _, ours = model
    result = ours(Request("horse " * 200, seed=1, steps=1, output="latent"))
    assert "dropped" in caplog.text and np.isfinite(result.latents).all()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_drawing_imports_no_torch(bundles, backend):
    """The runtime draws with numpy and the engine alone; what it must not import is looked up after a picture."""
    code = (f"import sys; from runtime import Pipeline, Request\n"
            f"Pipeline.load({str(bundles['sd1'])!r}, {backend!r}, size=(64, 64))(Request('a cat', steps=2))\n"
            "print([m for m in ('torch', 'onnx', 'onnxscript', 'diffusers', 'transformers') if m in sys.modules])")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip()) == (0, "[]"), run.stderr
