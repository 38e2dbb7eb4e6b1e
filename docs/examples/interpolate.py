"""Draw the way from one picture to another: two LoRAs, DDIM inversion, and frames between.

Each picture has a LoRA that was overfitted on it. Inverted with its own, it becomes the noise that draws it; a frame
starts from noise on the arc between the two, and mixes the LoRAs in the same shares (the interpolation of DiffMorpher,
Zhang et al., 2023, without its attention). Guidance is off, so that the inversion is undone by what follows.

    python docs/examples/interpolate.py sd15.bundle a.png b.png a.safetensors b.safetensors --prompt mountain -o way.gif
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from runtime import Lora, Pipeline, Request
from runtime.loop.interpolate import slerp

MILLISECONDS = 100
"""How long a frame is shown."""


def frames(pipe: Pipeline, pictures: tuple[Path, Path], loras: tuple[Path, Path], prompt: str, count: int = 11,
           steps: int = 50) -> Iterator[Image.Image]:
    """Yield `count` pictures, the first and the last of which are those given, as the model draws them."""
    height, width = pipe.config.pixels
    start, end = (pipe(Request(prompt, image=picture, loras=(Lora(str(lora)),), task="invert", steps=steps,
                               guidance=1.0, height=height, width=width, output="latent")).latents[0]
                  for picture, lora in zip(pictures, loras, strict=True))
    for i in range(count):
        share = i / (count - 1)
        mix = (Lora(str(loras[0]), 1 - share), Lora(str(loras[1]), share))
        request = Request(prompt, latents=slerp(start, end, share), loras=mix, steps=steps, guidance=1.0,
                          scheduler="ddim", height=height, width=width, seed=0)
        yield pipe(request).images[0]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Frames between two pictures, each with a LoRA of its own.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("pictures", type=Path, nargs=2)
    parser.add_argument("loras", type=Path, nargs=2)
    parser.add_argument("--prompt", required=True, help="what both LoRAs were trained with")
    parser.add_argument("--frames", type=int, default=11)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("-o", "--output", type=Path, default=Path("interpolation.gif"))
    options = parser.parse_args(arguments)
    pipe = Pipeline.load(options.bundle, options.backend)
    first, *rest = frames(pipe, tuple(options.pictures), tuple(options.loras), options.prompt, options.frames,
                          options.steps)
    first.save(options.output, save_all=True, append_images=rest, duration=MILLISECONDS, loop=0)
    print(options.output)


if __name__ == "__main__":
    main()
