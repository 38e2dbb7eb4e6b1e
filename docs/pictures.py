"""Draw docs/images/tasks.png: what pictures, masks, hints, videos and LoRAs do to the model that ships.

    python -m docs.pictures                                   # exports models/shapes to a temporary bundle first

Seeds are 0, 1, 2 … in every row; nothing is picked. A red frame says that the checker of `benchmarks quality` finds
something wrong: an object, a colour, a relation, or with a hint, a place.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from export import export
from export.attach import attach
from models.world import drawing, placed, scenes
from models.world.adherence import check
from models.world.captions import parse
from models.world.layouts import held_out
from models.world.scenes import Layout, Object, Scene
from models.world.steering import in_place, in_style
from runtime import Control, Lora, Pipeline, Request
from runtime.pictures.save import save

ROOT = Path(__file__).parent.parent
NET, LORA = ROOT / "models/shapes-edges", ROOT / "models/shapes-red-chalk/pytorch_lora_weights.safetensors"
SCALE, GAP, TITLE, LABEL = 2, 6, 30, 16  # a picture's pixels are SCALE wide; the others are pixels of the figure
WRONG, INK = (220, 30, 30), (33, 37, 41)


@dataclass(frozen=True)
class Cell:
    """A cell is a picture of a row, what is written under it, and whether it is right; None where not judged."""

    image: Image.Image
    label: str = ""
    right: bool | None = None


@dataclass(frozen=True)
class Row:
    title: str
    cells: Sequence[Cell]


def ask(prompt: str, seed: int, **options: object) -> Request:
    return Request(prompt, seed=seed, steps=20, guidance=2.0, scheduler="ddim", **options)  # type: ignore[arg-type]


def draw(pipe: Pipeline, requests: Sequence[Request]) -> list[Image.Image]:
    return [result.images[0] for result in pipe(list(requests))]


def right(image: Image.Image, told: str) -> bool:
    return check(np.asarray(image), parse(told)).ok


def image_to_image(pipe: Pipeline) -> list[Row]:
    """Draw by strength. The least ones show the picture, hardly changed, so only those from 0.2 on are judged."""
    strengths = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
    start, = draw(pipe, [ask("a large red star to the left of a small blue square on a white background", 0)])
    rows = []
    for seed, told in enumerate(("a green star to the left of an orange square on a white background",
                                 "a yellow circle to the left of a purple triangle on a navy background")):
        images = draw(pipe, [ask(told, seed, image=start, strength=strength) for strength in strengths])
        cells = [Cell(image, f"{strength:g}", right(image, told) if strength >= 0.2 else None)
                 for image, strength in zip(images, strengths, strict=True)]
        rows.append(Row(f'"{told}"   --image PICTURE --strength …', [Cell(start, "picture"), *cells]))
    return rows


def inpainting(pipe: Pipeline) -> list[Row]:
    rows = []
    for first, told, things, white in (
            ("a large red circle to the left of a large blue square on a grey background",
             "a large red circle to the left of {} on a grey background",
             ("a large yellow star", "a small green triangle", "a large purple cross", "a small orange diamond",
              "a large cyan circle"), np.s_[:, 32:]),
            ("a large green triangle above a large pink star on a black background",
             "{} above a large pink star on a black background",
             ("a small orange square", "a large blue diamond", "a small red circle", "a large yellow cross",
              "a small cyan star"), np.s_[:32])):
        start, = draw(pipe, [ask(first, 0)])
        pixels = np.zeros((scenes.IMAGE_SIZE, scenes.IMAGE_SIZE, 3), np.uint8)
        pixels[white] = 255
        mask, asked = Image.fromarray(pixels), [told.format(thing) for thing in things]
        images = draw(pipe, [ask(text, seed, image=start, mask=mask) for seed, text in enumerate(asked)])
        rows.append(Row(f'"{told.format("…")}"   --image PICTURE --mask MASK', [
            Cell(start, "picture"), Cell(mask, "mask: white is painted"),
            *(Cell(image, thing, right(image, text)) for image, thing, text in
              zip(images, things, asked, strict=True))]))
    return rows


COLOURS = (("red", "blue", "green"), ("yellow", "pink", "cyan"), ("green", "orange", "red"), ("cyan", "red", "pink"),
           ("pink", "green", "yellow"), ("purple", "yellow", "orange"))
GROUNDS = ("white", "black", "grey", "navy", "brown", "black")
HINTS = ((("star", "large", (20.0, 44.0)), ("circle", "small", (44.0, 20.0))),
         (("triangle", "small", (16.0, 16.0)), ("square", "large", (44.0, 24.0)), ("cross", "small", (24.0, 48.0))))


def control(pipe: Pipeline) -> list[Row]:
    rows = []
    for things in HINTS:
        shapes, sizes, centres = zip(*things, strict=True)
        layouts = [Layout(Scene(tuple(map(Object, shapes, colours, sizes)), (None,) * (len(shapes) - 1), ground),
                          tuple(scenes.RADII[size] for size in sizes), centres)
                   for colours, ground in zip(COLOURS, GROUNDS, strict=True)]
        hint = Image.fromarray(placed.edges(drawing.draw(layouts[:1]))[0]).convert("RGB")
        told = [f"{listed(v.scene)} on a {v.scene.background} background" for v in layouts]
        images = draw(pipe, [ask(text, seed, control=(Control("edges", hint),)) for seed, text in enumerate(told)])
        rows.append(Row(f'"{told[0]}" and in other colours   --control edges=HINT', [Cell(hint, "hint"), *(
            Cell(image, ", ".join(o.colour for o in layout.scene.objects), in_place(np.asarray(image), layout))
            for image, layout in zip(images, layouts, strict=True))]))
    return rows


def video(pipe: Pipeline) -> list[Row]:
    """Draw a star that goes right and a circle that goes left anew, with their edges as hints."""
    shapes, sizes = ("star", "circle"), ("large", "small")

    def moving(colours: Sequence[str], ground: str) -> list[Layout]:
        objects = tuple(map(Object, shapes, colours, sizes))
        return [Layout(Scene(objects, (None,), ground), tuple(scenes.RADII[size] for size in sizes),
                       ((16.0 + 4 * n, 44.0), (44.0 - 4 * n, 16.0))) for n in range(7)]

    frames = [Image.fromarray(frame) for frame in drawing.draw(moving(COLOURS[0][:2], GROUNDS[0]))]
    wanted = moving(COLOURS[1][:2], "navy")
    told = f"{listed(wanted[0].scene)} on a navy background"
    request = ask(told, 0, frames=frames, strength=0.9, control=(Control("edges", frames, preprocessor="canny"),))
    return [Row("the frames of a video", [Cell(frame) for frame in frames]),
            Row(f'"{told}"   --frames VIDEO --control edges=VIDEO,preprocessor=canny', [
                Cell(image, right=in_place(np.asarray(image), layout))
                for image, layout in zip(pipe(request).images, wanted, strict=True)])]


def listed(scene: Scene) -> str:
    """Return a scene's objects by colour and shape: "a red star, an orange cross and a blue circle"."""
    names = [f"{'an' if o.colour[0] in 'aeiou' else 'a'} {o.colour} {o.shape}" for o in scene.objects]
    return ", ".join(names[:-1]) + " and " + names[-1]


def lora(pipe: Pipeline) -> list[Row]:
    told = held_out(7, seed=2)
    rows = []
    for scale in (0.0, 1.0):
        images = draw(pipe, [ask(scene.caption, seed, loras=(Lora(str(LORA), scale),) if scale else ())
                             for seed, scene in enumerate(told)])
        title = f"--lora shapes-red-chalk/{LORA.name}:{scale:g}" if scale else "seven held-out captions, without"
        rows.append(Row(title, [Cell(image, right=judged(np.asarray(image), scene, scale > 0))
                                for image, scene in zip(images, told, strict=True)]))
    return rows


def judged(image: np.ndarray, scene: Scene, styled: bool) -> bool:
    """Return whether a picture is right: without the LoRA in all, with it in all but colours, and in its style."""
    return in_style(image) and check(image, scene, colours=False).ok if styled else check(image, scene).ok


def figure(sections: Sequence[tuple[str, Sequence[Row]]]) -> Image.Image:
    """Return one picture of all rows below each other, enlarged without smoothing."""
    side = scenes.IMAGE_SIZE * SCALE
    rows = [row for _, of_section in sections for row in of_section]
    across = max(len(row.cells) for row in rows)
    labels = [LABEL * any(cell.label for cell in row.cells) for row in rows]
    height = len(sections) * TITLE + sum(TITLE - 8 + side + label + GAP for label in labels)
    sheet = Image.new("RGB", (across * (side + GAP) + GAP, height + GAP), "white")
    pen, y = ImageDraw.Draw(sheet), GAP
    for name, of_section in sections:
        pen.text((GAP, y + 4), name, INK, ImageFont.load_default(18))
        y += TITLE
        for row in of_section:
            pen.text((GAP, y + 2), row.title, INK, ImageFont.load_default(13))
            y += TITLE - 8
            for n, cell in enumerate(row.cells):
                x = GAP + n * (side + GAP)
                sheet.paste(cell.image.resize((side, side), Image.Resampling.NEAREST), (x, y))
                pen.rectangle((x - 1, y - 1, x + side, y + side), outline=(200, 200, 200))
                if cell.right is False:
                    pen.rectangle((x - 3, y - 3, x + side + 2, y + side + 2), outline=WRONG, width=3)
                pen.text((x + side / 2, y + side + 2), cell.label, INK, ImageFont.load_default(11), anchor="ma")
            y += side + LABEL * any(cell.label for cell in row.cells) + GAP
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the figure of what pictures, masks, hints, videos and LoRAs do.")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs/images/tasks.png")
    with tempfile.TemporaryDirectory() as folder:
        output, bundle = parser.parse_args().output, Path(folder) / "shapes.bundle"
        export(ROOT / "models/shapes", bundle, progress=False)
        attach(NET, bundle, "edges", progress=False)
        pipe = Pipeline.load(bundle, "onnxruntime", batch=8, progress=False)
        sections = (("Image to image", image_to_image(pipe)), ("Inpainting", inpainting(pipe)),
                    ("ControlNet for edges", control(pipe)), ("Video", video(pipe)), ("LoRA", lora(pipe)))
        save(figure(sections), output, force=True)


if __name__ == "__main__":
    main()
