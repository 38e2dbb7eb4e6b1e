"""Draw a photo in the style of a LoRA: image to image, held to the photo's edges by a ControlNet.

    python -m export path/to/sd-controlnet-canny --into sd15.bundle --as canny
    python docs/examples/style_transfer.py sd15.bundle photo.jpg style.safetensors "1boy, game character" -o styled.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from runtime import Control, Lora, Pipeline, Request


def styled(pipe: Pipeline, photo: Path, lora: Path, prompt: str, negative: str | None = None, strength: float = 0.5,
           control: float = 0.5, steps: int = 50, seed: int | None = None) -> Image.Image:
    """Return the photo at the size of the pipeline.

    strength: how much is drawn anew. control: how much its edges hold.
    """
    request = Request(prompt, negative_prompt=negative, image=photo, strength=strength, loras=(Lora(str(lora)),),
                      control=(Control("canny", photo, scale=control, preprocessor="canny"),), steps=steps, seed=seed,
                      height=pipe.config.pixels[0], width=pipe.config.pixels[1])
    return pipe(request).images[0]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A photo in the style of a LoRA, held to its edges.")
    parser.add_argument("bundle", type=Path, help="with a ControlNet for edges attached as canny")
    parser.add_argument("photo", type=Path)
    parser.add_argument("lora", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--negative")
    parser.add_argument("--strength", type=float, default=0.5)
    parser.add_argument("--control", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--backend", default="auto")
    parser.add_argument("-o", "--output", type=Path, default=Path("styled.png"))
    options = parser.parse_args(arguments)
    pipe = Pipeline.load(options.bundle, options.backend, size=tuple(options.size) if options.size else None)
    styled(pipe, options.photo, options.lora, options.prompt, options.negative, options.strength, options.control,
           options.steps, options.seed).save(options.output)
    print(options.output)


if __name__ == "__main__":
    main()
