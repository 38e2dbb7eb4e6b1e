"""UNet steps: our engines beside diffusers, torch.compile, OpenVINO and ONNX Runtime, in turn, in one run.

examples:
  python -m benchmarks unet --random sd1                         Stable Diffusion 1.5 with random weights, no download
  python -m benchmarks unet sd15.bundle stable-diffusion-v1-5    your own checkpoint
  python -m benchmarks unet --random sd1 --only latentrt-openvino-bf16 diffusers-bf16 --rounds 20
  python -m benchmarks unet --random sd2-v --json unet.json --chart unet.png
  python -m benchmarks unet --random sdxl --only latentrt-openvino-bf16 --rounds 3     16 GB of memory free
  python -m benchmarks unet --random sdxl --device cuda          an NVIDIA GPU: with CUDA graphs and without

How to read it: one step is one call of the UNet with guidance, two rows a picture. Times are medians over the rounds;
`speed` is against diffusers in fp32. `image-step/s` counts every picture of --batch: over the steps of a sampler it is
pictures a second, text and decoding apart. `of floor` is the floor's time over the contender's: the floor is the UNet's
operations over the rate of a large matrix product in the contender's precision, measured by torch in the same rounds.
`error` is RMS against diffusers in fp32 on the same inputs, relative. `first s` is a start with nothing built (our
engines are built and checked against the reference, torch.compile compiles), `start s` one that finds what was built;
both from the first import to the end of the first call. `GB` is the peak of a process's resident memory, and weight
files that it maps count.

The waterfall below the table adds one technique at a time.

On a GPU a figure is the mean of half a second of calls on one stream, by the GPU's own clock; inputs and outputs stay
in its memory. torch.compile is in its mode max-autotune. `GPU GB` is the memory taken there, without CUDA's context.

Each contender has a process of its own and sleeps while another is timed. Where memory does not hold all of them, some
end before others start; the matrix rate is measured among all of them. Who computes in another precision than the
bundle, and cannot, is left out: Stable Diffusion XL is made in fp16, which ONNX Runtime's own CPU session does not run.
"""

from __future__ import annotations

import argparse

from benchmarks.harness.networks import component


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    component.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure the UNet; return the exit status, 1 where one of latentrt's engines could not be."""
    techniques = WATERFALL if args.device == "cpu" else gpu_waterfall(args.dtype or "fp16")
    return component.run(args, "unet", "One UNet step with guidance", techniques)


def gpu_waterfall(dtype: str) -> tuple[tuple[str, str], ...]:
    """Return the waterfall of a GPU for one 16-bit precision, in the form of WATERFALL."""
    return (("diffusers, fp32", component.REFERENCE), (f"{dtype}, channels last", f"diffusers-{dtype}"),
            ("compiled, our kernels", f"latentrt-inductor-eager-{dtype}"),
            ("CUDA graph", f"latentrt-inductor-{dtype}"))


WATERFALL = (
    ("ONNX Runtime, fp32", "onnxruntime-fp32"),
    ("OpenVINO, fp32", "openvino-fp32"),
    ("bf16", "openvino-bf16"),
    ("angles of the timestep in fp32", "latentrt-openvino-plugin-kernels-bf16"),
    ("our attention, in a graph of bfloat16", "latentrt-openvino-plugin-norm-bf16"),
    ("our group norm + SiLU, channels last", "latentrt-openvino-whole-bf16"),
    ("what text and time decide, before the steps", "latentrt-openvino-bf16"),
)
"""(technique, contender that has it and all before it) on a CPU."""
