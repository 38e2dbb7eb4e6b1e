"""VAE decoding: our engines beside diffusers, torch.compile, OpenVINO and ONNX Runtime, in turn, in one run.

examples:
  python -m benchmarks vae --random sd1                          512x512 pixels
  python -m benchmarks vae --random sd1 --size 1024x1024 --device cuda
  python -m benchmarks vae sd15.bundle stable-diffusion-v1-5 --only latentrt-openvino-bf16 diffusers-bf16

How to read it: as `python -m benchmarks unet --help` says; one call decodes --batch pictures at once.
"""

from __future__ import annotations

import argparse

from benchmarks.harness.networks import component


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    component.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure the decoder; return the exit status, 1 where one of latentrt's engines could not be."""
    pictures = f"{args.batch} pictures" if args.batch > 1 else "a picture"
    return component.run(args, "vae_decoder", f"Decoding {pictures}")
