"""Prompt to picture: our engines beside diffusers and torch.compile, same weights and seed, in turn, in one run.

examples:
  python -m benchmarks pipeline --random sd1                       Stable Diffusion 1.5 with random weights, no download
  python -m benchmarks pipeline sd15.bundle stable-diffusion-v1-5  your own checkpoint
  python -m benchmarks pipeline sd15.bundle stable-diffusion-v1-5 --steps 50 --batch 4 --only latentrt-openvino-bf16
  python -m benchmarks pipeline build/shapes.bundle models/shapes --guidance 2 --prompt "a large red circle"

How to read it: seconds are medians over the rounds, from the prompt to uint8 pixels of the whole batch, and so are the
stages text, denoise and decode. `max` (of 255) and `PSNR` compare the first call's pictures with those of diffusers in
fp32. They mean little with random weights: guidance blows up what rounding begins, and no training has made the model
forgive it. The floor is the operations of all stages over the rate of a large matrix product, measured in the same
rounds. `first s` is a start with nothing built, `start s` one that finds what was built; both end with a picture of one
step. `GB` is the peak of a process's resident memory, and weight files that it maps count.

Every contender uses the checkpoint's own sampler. Each has a process of its own and sleeps while another is timed;
where memory does not hold all of them, some end before others start. OpenVINO GenAI and optimum-intel are left out:
both need the checkpoint converted once more, by optimum-intel's own export.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from benchmarks.harness import limits, measure, random_model, turns
from benchmarks.harness.given import configure_compiler, freeze
from benchmarks.harness.turns import Contender, Job, Measured, number
from engines import Bundle
from engines.cli.options import positive

STAGES = ("text", "denoise", "decode")
TEXT = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
"""What diffusers makes of a prompt; the last two in Stable Diffusion XL alone."""


@dataclass(frozen=True)
class Drawing(Job):
    """What is drawn: `batch` pictures of one prompt, picture i from seed + i."""

    prompt: str = ""
    steps: int = 20
    guidance: float = 7.5
    seed: int = 0


@dataclass(frozen=True)
class Drawn:
    """images: uint8 [batch, height, width, 3]. stages: seconds by name."""

    images: np.ndarray
    stages: Mapping[str, float]


Draw = Callable[[], Drawn]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    turns.add_arguments(parser, list(CONTENDERS), rounds=3, seconds=60.0, least=1, families=random_model.FAMILIES[:3])
    parser.add_argument("--prompt", default="a photograph of an astronaut riding a horse", metavar="TEXT")
    parser.add_argument("--steps", type=positive, default=20, metavar="N", help="default %(default)s")
    parser.add_argument("--guidance", type=float, default=7.5, metavar="SCALE", help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first picture (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    if not (math.isfinite(args.guidance) and args.guidance > 1):
        raise ValueError(f"--guidance: got {args.guidance:g}, expected a number above 1, such as 7.5")
    with turns.opened(args) as job:
        drawing = Drawing(**vars(job), prompt=args.prompt, steps=args.steps, guidance=args.guidance, seed=args.seed)
        manifest = Bundle.open(job.bundle).manifest
        if "text-to-image" not in manifest.tasks:
            raise ValueError(f"{job.bundle}: got a model that does {', '.join(manifest.tasks)}, expected one that does "
                             "text-to-image; `python -m benchmarks unet` measures its UNet")
        report: dict[str, Any] = {
            "machine": measure.machine(), "model": manifest.family,
            "size": f"{job.height}x{job.width}", "batch": job.batch, "steps": args.steps, "guidance": args.guidance,
            "seed": args.seed, "prompt": args.prompt}
        status = turns.compare(turns.chosen(args, CONTENDERS, REFERENCE), LIMIT, drawing, args, report,
                               partial(figures, batch=job.batch), show)
    if args.chart:
        pictures = f"{job.batch} pictures" if job.batch > 1 else "picture"
        turns.draw(args.chart, report, f"Prompt to {pictures}, {args.steps} steps")
    return status


def figures(found: Mapping[str, Measured], batch: int) -> dict[str, Any]:
    """Results by contender: stages, pictures/s, share of the floor, speed and difference against REFERENCE."""
    floors = turns.limits_of(found).get("floor_seconds", {})
    reference = found[REFERENCE]
    results = {name: own.figures() for name, own in found.items() if name != turns.LIMITS}
    for name, result in results.items():
        if "median" in result:
            median, drawn = result["median"], found[name].results
            result |= {"stages": {s: float(np.median([d.stages[s] for d in drawn])) for s in STAGES},
                       "images_per_second": batch / median, "share_of_floor": floors[name[-4:]] / median}
            if reference.seconds:
                result |= {"speed": results[REFERENCE]["median"] / median,
                           **difference(drawn[0].images, reference.results[0].images)}
    return {"results": results}


def difference(got: np.ndarray, expected: np.ndarray) -> dict[str, Any]:
    """max_difference of uint8 pictures (of 255) and psnr in decibels, None where they are equal."""
    error = got.astype(np.float64) - expected
    mean = float(np.mean(error**2))
    return {"max_difference": int(np.abs(error).max()), "psnr": 10 * math.log10(255**2 / mean) if mean else None}


def show(report: Mapping[str, Any]) -> None:
    """Print what there is."""
    if rows := [_row(name, r) for name, r in report["results"].items() if "median" in r]:
        print(measure.table(rows))


def ours(backend: str, dtype: str) -> Contender:
    """The runtime with our engines of one backend and precision."""
    return Contender(partial(_ours, backend, dtype), keeps=True, backend=backend, dtype=dtype)


def _ours(backend: str, dtype: str, job: Drawing) -> Draw:
    from engines.store.store import build_all
    from runtime import Pipeline, Request

    size = (job.height, job.width)
    if job.fresh:
        bundle = Bundle.open(job.bundle)
        used = [name for name in bundle.manifest.components if name != "vae_encoder"]
        build_all(bundle, backend, sizes=[size], batches=[job.batch], dtype=dtype, components=used, rebuild=True)
    pipe = Pipeline.load(job.bundle, backend, dtype=dtype, size=size, batch=job.batch, progress=False)

    def draw(steps: int) -> Drawn:
        result = pipe(Request(job.prompt, steps=steps, guidance=job.guidance, seed=job.seed, count=job.batch))
        return Drawn(np.stack([np.asarray(image) for image in result.images]),
                     {stage: result.timings[stage] for stage in STAGES})
    return _warm(draw, job)


def _diffusers(dtype: str, job: Drawing) -> Draw:
    return _torch(dtype, job, compiled=False)


def _compiled(dtype: str, job: Drawing) -> Draw:
    """UNet and VAE decoder through torch.compile, as its documentation does, frozen."""
    configure_compiler(job)
    freeze()
    return _torch(dtype, job, compiled=True)


def _torch(dtype: str, job: Drawing, compiled: bool) -> Draw:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()  # diffusers' imports make it advise us to install torchvision
    transformers.logging.disable_progress_bar()
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    xl = Bundle.open(job.bundle).manifest.condition("sizes") is not None
    kind, options = (StableDiffusionXLPipeline, {}) if xl else (StableDiffusionPipeline, {"safety_checker": None})
    pipe = kind.from_pretrained(job.checkpoint, local_files_only=True, dtype=getattr(torch, limits.DTYPES[dtype]),
                                **options)
    pipe.set_progress_bar_config(disable=True)
    if dtype != "fp32":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    if compiled:
        pipe.unet = torch.compile(pipe.unet, dynamic=False)
        pipe.vae.decode = torch.compile(pipe.vae.decode, dynamic=False)

    @torch.inference_mode()
    def draw(steps: int) -> Drawn:
        times = [time.perf_counter()]
        text = pipe.encode_prompt(job.prompt, device="cpu", num_images_per_prompt=job.batch,
                                  do_classifier_free_guidance=True)
        times.append(time.perf_counter())
        latents = pipe(**dict(zip(TEXT, text, strict=False)), height=job.height, width=job.width,
                       num_inference_steps=steps, guidance_scale=job.guidance, output_type="latent",
                       generator=[torch.Generator("cpu").manual_seed(job.seed + i) for i in range(job.batch)]).images
        times.append(time.perf_counter())
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
        images = pipe.image_processor.postprocess(decoded, output_type="pil")
        times.append(time.perf_counter())
        return Drawn(np.stack([np.asarray(image) for image in images]),
                     dict(zip(STAGES, np.diff(times).tolist(), strict=True)))
    return _warm(draw, job)


def _limits(job: Drawing) -> Callable[[], dict[str, float]]:
    import diffusers

    bundle = Bundle.open(job.bundle)
    factor, tokens = bundle.manifest.latent.factor, bundle.manifest.text[0].max_length
    height, width = job.height // factor, job.width // factor
    config = json.loads((job.checkpoint / "scheduler" / "scheduler_config.json").read_text(encoding="utf8"))
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(job.steps)
    flops = (limits.text_encoder_flops(job.checkpoint, 2, tokens)
             + len(scheduler.timesteps) * limits.unet_flops(job.checkpoint, 2 * job.batch, height, width, tokens)
             + limits.vae_decoder_flops(job.checkpoint, job.batch, height, width))
    return lambda: limits.sample(flops)


def _warm(draw: Callable[[int], Drawn], job: Drawing) -> Draw:
    draw(1)
    return partial(draw, job.steps)


def _row(name: str, r: Mapping[str, Any]) -> dict[str, str]:
    different = r.get("max_difference")
    return {"contender": name, "seconds": f"{r['median']:.2f}", **{s: f"{r['stages'][s]:.2f}" for s in STAGES},
            "image/s": f"{r['images_per_second']:.3g}", "speed": number(r.get("speed"), ".2f", " x"),
            "of floor": f"{100 * r['share_of_floor']:.0f} %", "max": number(different, "d"),
            "PSNR": "equal" if different == 0 else number(r.get("psnr"), ".1f", " dB"),
            "first s": number(r["build_seconds"], ".1f"), "start s": number(r["load_seconds"], ".1f"),
            "GB": f"{r['peak_bytes'] / 1e9:.1f}"}


REFERENCE = "diffusers-fp32"
LIMIT = Contender(_limits)
CONTENDERS = {
    "latentrt-openvino-bf16": ours("openvino", "bf16"),
    "diffusers-bf16": Contender(partial(_diffusers, "bf16")),
    "diffusers-compile-bf16": Contender(partial(_compiled, "bf16"), keeps=True),
    REFERENCE: Contender(partial(_diffusers, "fp32")),
    "latentrt-openvino-fp32": ours("openvino", "fp32"),
    "latentrt-onnxruntime-fp32": ours("onnxruntime", "fp32"),
}
"""Those that hold the weights in 16 bits first: memory holds more of them together. A name ends in its precision."""
