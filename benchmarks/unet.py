"""UNet steps: our engines beside diffusers, torch.compile, OpenVINO and ONNX Runtime, in turn, in one run.

examples:
  python -m benchmarks unet --random sd1                         Stable Diffusion 1.5 with random weights, no download
  python -m benchmarks unet sd15.bundle stable-diffusion-v1-5    your own checkpoint
  python -m benchmarks unet --random sd1 --only latentrt-openvino-bf16 diffusers-bf16 --rounds 20
  python -m benchmarks unet --random sd2-v --json unet.json --chart unet.png

How to read it: one step is one call of the UNet with guidance, two rows a picture. Seconds are medians over the rounds;
`speed` is against diffusers in fp32. `of floor` is the floor's time over the contender's: the floor is the UNet's
operations over the rate of a large matrix product in the contender's precision, measured by torch in the same rounds.
`error` is RMS against diffusers in fp32 on the same inputs, relative. `first s` is a start with nothing built (our
engines are built and checked against the reference, torch.compile compiles), `start s` one that finds what was built;
both from the first import to the end of the first call. `GB` is the peak of a process's resident memory, and weight
files that it maps count.

The waterfall below the table adds one technique at a time to ONNX Runtime in fp32.

Each contender has a process of its own and sleeps while another is timed. Where memory does not hold all of them, some
end before others start; the matrix rate is measured among all of them. Stable Diffusion XL is left out: export does not
know its added conditions yet.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks import limits, measure, turns
from benchmarks.turns import Contender, Job, Measured, number
from engines import Bundle

Call = Callable[[], np.ndarray]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    turns.add_arguments(parser, list(CONTENDERS), rounds=10, seconds=20.0, least=3)


def run(args: argparse.Namespace) -> int:
    with turns.opened(args) as job:
        report: dict[str, Any] = {"machine": measure.machine(), "model": Bundle.open(job.bundle).manifest.family,
                                  "size": f"{job.height}x{job.width}", "rows": 2 * job.batch}
        status = turns.compare(turns.chosen(args, CONTENDERS, REFERENCE), LIMIT, job, args, report, figures, show)
    if args.chart:
        turns.draw(args.chart, report, "One UNet step with guidance")
    return status


def figures(found: Mapping[str, Measured]) -> dict[str, Any]:
    """Results by contender (steps/s, share of the floor, speed and error against REFERENCE), and the waterfall."""
    floors = turns.limits_of(found).get("floor_seconds", {})
    reference = found[REFERENCE]
    results = {name: own.figures() for name, own in found.items() if name != turns.LIMITS}
    for name, result in results.items():
        if "median" in result:
            median = result["median"]
            result |= {"steps_per_second": 1 / median, "share_of_floor": floors[name[-4:]] / median}
            if reference.seconds:
                result |= {"speed": results[REFERENCE]["median"] / median,
                           "rel_rms": relative_rms(found[name].results[0], reference.results[0])}
    return {"results": results, "waterfall": waterfall(results)}


def waterfall(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One technique a row: seconds a step with it and all before it, and how much faster it made the row before."""
    rows: list[dict[str, Any]] = []
    for (_, before), (technique, name) in pairwise((WATERFALL[0], *WATERFALL)):  # the first is compared with itself
        now, last = results.get(name, {}), results.get(before, {})
        if "median" not in now or "median" not in last:
            return []
        rows.append({"technique": technique, "contender": name, "seconds": now["median"],
                     "factor": last["median"] / now["median"], "rel_rms": now.get("rel_rms")})
    return rows


def relative_rms(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))


def show(report: Mapping[str, Any]) -> None:
    """Print what there is."""
    if rows := [_row(name, r) for name, r in report["results"].items() if "median" in r]:
        print(measure.table(rows))
    if steps := report["waterfall"]:
        print()
        print(measure.table([{"waterfall": s["technique"], "s/step": f"{s['seconds']:.3f}", "gain":
                              f"{s['factor']:.2f} x", "error": number(s["rel_rms"], ".1e")} for s in steps]))
        print()


def inputs(job: Job) -> dict[str, np.ndarray]:
    """Standard normal float32 inputs of the UNet by name, the same for everyone; the timestep is 601."""
    bundle, rng = Bundle.open(job.bundle), np.random.default_rng(0)
    factor = bundle.manifest.latent.factor
    dims = {"batch": 2 * job.batch, "latent_height": job.height // factor, "latent_width": job.width // factor,
            "sequence": bundle.manifest.text[0].max_length}
    arrays = {spec.name: rng.standard_normal(spec.resolve(dims).empty().shape).astype(np.float32)
              for spec in bundle.component("unet").inputs}
    arrays["timestep"][:] = 601.0
    return arrays


def _ours(backend: str, dtype: str, options: Mapping[str, Any], job: Job) -> Call:
    import engines
    from runtime.buffers import BoundEngine

    bundle, feed = Bundle.open(job.bundle), inputs(job)
    config = bundle.config("unet", backend=backend, dtype=dtype, batch=2 * job.batch, height=job.height,
                           width=job.width, options=options)
    if job.fresh:
        engines.build(bundle, "unet", config, rebuild=True)
    engine = BoundEngine(engines.load(bundle, "unet", config))
    return _warm(lambda: engine(**feed)["noise_pred"].copy())


def _openvino(precision: str, job: Job) -> Call:
    """OpenVINO's own runtime on the bundle's graph, as its documentation shows: read, reshape, compile, infer."""
    import openvino

    bundle, feed, core = Bundle.open(job.bundle), inputs(job), openvino.Core()
    model = core.read_model(bundle.path / bundle.component("unet").file)
    model.reshape({name: list(array.shape) for name, array in feed.items()})
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision,
                                                 "PERFORMANCE_HINT": "LATENCY"})
    return _warm(lambda: compiled(feed)[0].copy())


def _onnxruntime(job: Job) -> Call:
    """ONNX Runtime's own session on the bundle's graph, with its defaults."""
    import onnxruntime

    bundle, feed = Bundle.open(job.bundle), inputs(job)
    session = onnxruntime.InferenceSession(bundle.path / bundle.component("unet").file,
                                           providers=["CPUExecutionProvider"])
    return _warm(lambda: session.run(None, feed)[0])


def _diffusers(dtype: str, job: Job) -> Call:
    from diffusers import UNet2DConditionModel

    return _torch(UNet2DConditionModel, dtype, job, compiled=False)


def _compiled(dtype: str, job: Job) -> Call:
    """torch.compile for this shape, with weights as constants that the compiler may repack (freezing)."""
    configure_compiler(job)
    from diffusers import UNet2DConditionModel

    return _torch(UNet2DConditionModel, dtype, job, compiled=True)


def configure_compiler(job: Job) -> None:
    """Freezing on, and the job's cache directory; before torch is imported."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(job.cache)
    warnings.filterwarnings("ignore", module=r"torch\._dynamo")  # advice to who wrote the model
    import torch._inductor.config

    torch._inductor.config.freezing = True


def _torch(model: Any, dtype: str, job: Job, compiled: bool) -> Call:
    import torch

    kind = getattr(torch, limits.DTYPES[dtype])
    unet = model.from_pretrained(job.checkpoint, subfolder="unet", dtype=kind).eval()
    if dtype != "fp32":
        unet = unet.to(memory_format=torch.channels_last)
    if compiled:
        unet = torch.compile(unet, dynamic=False)
    sample, timestep, text = (torch.from_numpy(array) for array in inputs(job).values())

    @torch.inference_mode()
    def call() -> np.ndarray:
        return unet(sample.to(kind), timestep, text.to(kind), return_dict=False)[0].float().numpy()
    return _warm(call)


def _limits(job: Job) -> Callable[[], dict[str, float]]:
    feed = inputs(job)
    rows, _, height, width = feed["sample"].shape
    flops = limits.unet_flops(job.checkpoint, rows, height, width, feed["encoder_hidden_states"].shape[1])
    return lambda: limits.sample(flops)


def _warm(call: Call) -> Call:
    call()
    return call


def _row(name: str, r: Mapping[str, Any]) -> dict[str, str]:
    return {"contender": name, "s/step": f"{r['median']:.3f}", "p20": f"{r['p20']:.3f}", "p80": f"{r['p80']:.3f}",
            "step/s": f"{r['steps_per_second']:.3f}", "speed": number(r.get("speed"), ".2f", " x"),
            "of floor": f"{100 * r['share_of_floor']:.0f} %", "error": number(r.get("rel_rms"), ".1e"),
            "first s": number(r["build_seconds"], ".1f"), "start s": number(r["load_seconds"], ".1f"),
            "GB": f"{r['peak_bytes'] / 1e9:.1f}"}


REFERENCE = "diffusers-fp32"
LIMIT = Contender(_limits)
CONTENDERS = {
    "latentrt-openvino-bf16": Contender(partial(_ours, "openvino", "bf16", {}), keeps=True),
    "latentrt-inductor-bf16": Contender(partial(_ours, "inductor", "bf16", {}), keeps=True),
    "openvino-bf16": Contender(partial(_openvino, "bf16")),
    "diffusers-bf16": Contender(partial(_diffusers, "bf16")),
    "diffusers-compile-bf16": Contender(partial(_compiled, "bf16"), keeps=True),
    "latentrt-openvino-plugin-kernels-bf16": Contender(
        partial(_ours, "openvino", "bf16", {"attention": "openvino", "norm": "openvino"}), keeps=True),
    "latentrt-openvino-plugin-norm-bf16": Contender(
        partial(_ours, "openvino", "bf16", {"norm": "openvino"}), keeps=True),
    REFERENCE: Contender(partial(_diffusers, "fp32")),
    "latentrt-openvino-fp32": Contender(partial(_ours, "openvino", "fp32", {}), keeps=True),
    "openvino-fp32": Contender(partial(_openvino, "f32")),
    "latentrt-onnxruntime-fp32": Contender(partial(_ours, "onnxruntime", "fp32", {}), keeps=True),
    "onnxruntime-fp32": Contender(_onnxruntime),
}
"""Those that hold the weights in 16 bits first: memory holds more of them together. A name ends in its precision."""
WATERFALL = (
    ("ONNX Runtime, fp32", "onnxruntime-fp32"),
    ("OpenVINO, fp32", "openvino-fp32"),
    ("bf16", "openvino-bf16"),
    ("angles of the timestep in fp32", "latentrt-openvino-plugin-kernels-bf16"),
    ("our attention", "latentrt-openvino-plugin-norm-bf16"),
    ("our group norm + SiLU, channels last", "latentrt-openvino-bf16"),
)
"""Technique, and the contender that has it and all before it."""
