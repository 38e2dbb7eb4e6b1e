"""What `python -m tests.record` draws: requests that cover every task and every option, several in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from runtime import Control, Lora, Pipeline, Request

SAMPLERS = ("ddpm", "ddim", "pndm", "lms", "euler", "euler_karras", "euler_exponential", "euler_ancestral", "heun",
            "dpm2", "dpm++_2m", "dpm++_2m_karras", "dpm++_2m_sde", "dpm++_2m_sde_karras", "unipc", "unipc_karras",
            "lcm")
SIZE, SQUARE = (64, 128), {"height": 64, "width": 64}
LONG = "a (cat:1.3), " * 12 + "and a [horse] BREAK on ((the)) hill " + "of the rain, " * 9
COMMON = {"prompt": "a cat and a horse", "negative_prompt": "rain", "steps": 6, "seed": 3}
SHAPES = {"negative_prompt": None, "steps": 12, "guidance": 2.0, "scheduler": "ddim"}
FILLED = ("height", "width", "seed", "strength", "noise_level")


class Watch:
    """Keeps what on_step is called with, and previews of some steps; cancels at (image, step)."""

    def __init__(self, previews: tuple[int, ...] = (), cancel: tuple[int, int] | None = None) -> None:
        self.previews, self.cancel = previews, cancel
        self.numbers: list[tuple[float, ...]] = []
        self.latents: list[np.ndarray] = []
        self.pictures: list[np.ndarray] = []

    def __call__(self, step: Any) -> bool:
        self.numbers.append((step.image, step.step, step.steps, step.timestep))
        self.latents.append(step.latents.copy())
        if step.step in self.previews:
            self.pictures.append(np.asarray(step.preview()))
        return (step.image, step.step) != self.cancel


class Draw:
    """Draws requests on one engine with pipelines that it keeps; `arrays` are what is kept of them, by name."""

    def __init__(self, bundles: Path, backend: str, dtype: str) -> None:
        self.bundles, self.backend, self.dtype = bundles, backend, dtype
        self.arrays: dict[str, np.ndarray] = {}
        self._pipelines: dict[tuple[Any, ...], Pipeline] = {}

    def __call__(self, bundle: str, requests: Mapping[str, Mapping[str, Any]], *, size: tuple[int, int] = SIZE,
                 batch: int = 1, **load: Any) -> dict[str, Any]:
        """The results of one call by label; each request is its fields beside COMMON, with a `Watch` unless told."""
        key = (bundle, size, batch, *load.items())
        if key not in self._pipelines:
            self._pipelines[key] = Pipeline.load(self.bundles / bundle, self.backend, dtype=self.dtype, size=size,
                                                 batch=batch, threads=2, progress=False, **load)
        pipe = self._pipelines[key]
        made = {label: Request(**{**COMMON, "on_step": Watch(), **fields}) for label, fields in requests.items()}
        results = dict(zip(made, pipe(list(made.values())), strict=True))
        for label, result in results.items():
            assert f"{label}/latents" not in self.arrays, f"two requests are labelled {label}"
            filled = [getattr(result.request, name) for name in FILLED]
            found = {"latents": result.latents, "decoded": pipe.decode(result.latents),
                     "images": np.array([np.asarray(image) for image in result.images]),
                     "flags": np.array([result.cancelled, *result.withheld]),
                     "filled": np.array([-1 if value is None else value for value in filled], np.float64)}
            if isinstance(watch := made[label].on_step, Watch):
                found |= {"steps": np.array(watch.numbers), "step_latents": np.array(watch.latents),
                          "previews": np.array(watch.pictures)}
            self.arrays |= {f"{label}/{name}": array for name, array in found.items()}
        return results


def text_to_image(draw: Draw, at: Path) -> None:
    draw("sd1", {"two": {"count": 2}, "unwatched": {"on_step": None}, "unguided": {"guidance": 1.0},
                 "no negative": {"negative_prompt": None}, "rescaled": {"guidance_rescale": 0.7, "guidance": 12.0},
                 "square": SQUARE, "twenty": {"steps": 20}})


def text_to_image_sd2(draw: Draw, at: Path) -> None:
    draw("sd2", {"two": {"count": 2}, "unguided": {"guidance": 1.0}, "rescaled": {"guidance_rescale": 0.5}})


def samplers(draw: Draw, at: Path) -> None:
    draw("sd1", {**{name: {"scheduler": name} for name in SAMPLERS},
                 "eta": {"scheduler": "ddim", "eta": 0.8}, "timesteps": {"scheduler": "ddpm",
                                                                         "timesteps": (900, 600, 350, 100)}})


def samplers_sd2(draw: Draw, at: Path) -> None:
    draw("sd2", {name: {"scheduler": name} for name in SAMPLERS})


def samplers_from_a_picture(draw: Draw, at: Path) -> None:
    draw("sd1", {name: {"scheduler": name, "image": at / "image.png", "strength": 0.6} for name in SAMPLERS})


def prompts(draw: Draw, at: Path) -> None:
    word = {"embeddings": (at / "wug.safetensors",), "prompt": "a wug and a horse"}
    weighted = {"prompt_style": "weighted"}
    draw("sd1", {"weights": {**weighted, "prompt": "a (cat:1.4) and a [horse], ((hill))"},
                 "break": {**weighted, "prompt": "a cat BREAK a (horse:0.7)"}, "long": {**weighted, "prompt": LONG},
                 "long negative": {**weighted, "negative_prompt": LONG}, "cut": {"prompt": LONG}, "word": word,
                 "weighted word": {**word, **weighted, "prompt": "a (wug:1.3)"}, "empty": {"prompt": ""},
                 "renamed": {**word, "embeddings": (f"<dax>={at / 'wug.safetensors'}",), "negative_prompt": "<dax>"}})


def image_to_image(draw: Draw, at: Path) -> None:
    image = {"image": at / "image.png"}
    draw("sd1", {"half": {**image, "strength": 0.5, "count": 2}, "default": image, "whole": {**image, "strength": 1.0},
                 "mean": {**image, "encoding": "mean"}, "unguided": {**image, "guidance": 1.0},
                 "small": {"image": at / "other.png"}, "resized": {"image": at / "other.png", **SQUARE},
                 "floats": {"image": np.load(at / "depth.npy")[:, :96, None].repeat(3, 2) / np.float32(120)}})
    draw("sd2", {"sd2": {**image, "strength": 0.5}})


def inpaint_by_blending(draw: Draw, at: Path) -> None:
    given = {"image": at / "image.png", "mask": at / "mask.png"}
    draw("sd1", {f"{blend} {scheduler}": {**given, "blend": blend, "scheduler": scheduler, "paste": scheduler == "heun"}
                 for blend in ("current", "next", "before") for scheduler in ("pndm", "euler_ancestral", "heun")}
         | {"half": {**given, "strength": 0.5, "count": 2}, "next whole": {**given, "blend": "next", "strength": 1.0}})


def inpaint_9_channels(draw: Draw, at: Path) -> None:
    given = {"image": at / "image.png", "mask": at / "mask.png"}
    kinds: dict[str, dict[str, Any]] = {
        "default": {}, "part": {"strength": 0.7, "count": 2}, "paste": {"paste": True, "guidance": 1.0},
        "euler": {"scheduler": "euler_ancestral"}}
    for name in ("inpainting", "inpainting_2"):
        draw(name, {f"{name} {label}": {**given, **fields} for label, fields in kinds.items()})


def depth(draw: Draw, at: Path) -> None:
    image = {"image": at / "image.png"}
    draw("depth", {"given": {**image, "depth": np.load(at / "depth.npy"), "count": 2},
                   "unguided": {**image, "depth": at / "mask.png", "guidance": 1.0, "strength": 0.5}})
    draw("depth", {"estimated": image}, depth_estimator=brightness)


def upscale(draw: Draw, at: Path) -> None:
    low = {"image": at / "low.png"}
    draw("upscaler", {"default": {**low, "count": 2}, "noisy": {**low, "noise_level": 250, "guidance": 1.0},
                      "euler": {**low, "scheduler": "euler"}})


def invert(draw: Draw, at: Path) -> None:
    for name in ("sd1", "sd2"):
        plain = {"guidance": 1.0, "steps": 8}
        noise = draw(name, {f"{name} noise": {**plain, "image": at / "image.png", "task": "invert",
                                              "output": "latent"}})
        draw(name, {f"{name} again": {**plain, "latents": noise[f"{name} noise"].latents[0], "scheduler": "ddim"}})


def xl(draw: Draw, at: Path) -> None:
    image, mask = {"image": at / "image.png"}, {"mask": at / "mask.png"}
    draw("sdxl", {"plain": {"count": 2}, "zeros": {"negative_prompt": None}, "unguided": {"guidance": 1.0},
                  "sizes": {"original_size": (48, 96), "crop": (4, 8), "target_size": (128, 256)},
                  "weights": {"prompt_style": "weighted", "prompt": "a (cat:1.4) and a [horse]"},
                  "long": {"prompt_style": "weighted", "prompt": LONG},
                  "word": {"prompt": "a wug-xl", "embeddings": (at / "wug-xl.safetensors",)},
                  "sampler": {"scheduler": "dpm++_2m_karras"}, "picture": {**image, "strength": 0.6},
                  "inpaint": {**image, **mask, "strength": 0.8},
                  "net": {"control": Control("net0", at / "hint.png", scale=0.7)},
                  "styled": {"loras": [Lora(str(at / "xl-kohya.safetensors"), 0.8, text_scale=0.5)]}, "after": {}})


def refiner(draw: Draw, at: Path) -> None:
    draw("refiner", {"picture": {"image": at / "image.png", "strength": 0.6, "count": 2},
                     "scores": {"image": at / "image.png", "aesthetic_score": 8.0, "negative_aesthetic_score": 1.0}})
    for scheduler in (None, "heun"):
        part, own = {"steps": 10, "scheduler": scheduler, "count": 2}, scheduler or "own"
        base = draw("sdxl", {f"{own} base": {**part, "denoising_end": 0.6, "output": "latent"}})
        draw("refiner", {f"{own} rest": {**part, "image": base[f"{own} base"].latents, "denoising_start": 0.6}})


def control_nets(draw: Draw, at: Path) -> None:
    one = Control("net0", at / "hint.png", scale=0.7)
    edges = Control("net1", at / "image.png", preprocessor="canny")
    part = Control("net1", at / "other.png", scale=1.3, start=0.2, end=0.7)
    image = {"image": at / "image.png", "strength": 0.7}
    draw("sd1", {"one": {"control": one, "count": 2}, "canny": {"control": edges}, "part": {"control": part},
                 "two": {"control": (one, part)}, "unguided": {"control": (one, edges), "guidance": 1.0},
                 "picture": {**image, "control": (one, part)}, "heun": {"control": part, "scheduler": "heun"},
                 "inpaint": {**image, "mask": at / "mask.png", "control": one}, "none": {}})


def loras(draw: Draw, at: Path) -> None:
    """From none to one, another, both, and none again, in one call and in two."""
    kohya, attention = str(at / "kohya.safetensors"), str(at / "attention.safetensors")
    kinds = {"none": [], "text too": [Lora(kohya)], "attention": [Lora(attention, 0.8)],
             "both": [Lora(kohya, 0.7), Lora(attention, -0.4)], "other text": [Lora(kohya, 0.6, text_scale=0.3)],
             "none again": []}
    draw("sd1", {label: {"loras": kind} for label, kind in kinds.items()})
    draw("sd1", {"after": {}, "net": {"loras": kinds["both"], "control": Control("net0", at / "hint.png")},
                 "picture": {"loras": [attention], "image": at / "image.png"}})


def video(draw: Draw, at: Path) -> None:
    clip, hints = {"frames": at / "clip", "strength": 0.7}, at / "hints"
    requests: dict[str, dict[str, Any]] = {
        "plain": clip, "heun": {**clip, "scheduler": "heun", "limit": 3}, "still": {"image": at / "image.png"},
        "gif": {**clip, "frames": at / "clip.gif", "every": 2},
        "mp4": {**clip, "frames": at / "clip.mp4", "limit": 2, "guidance": 1.0},
        "net": {**clip, "control": Control("net0", hints, scale=0.7)},
        "canny": {**clip, "limit": 3, "control": Control("net1", at / "hints.mp4", preprocessor="canny")},
        "styled": {**clip, "limit": 2, "loras": [at / "kohya.safetensors"]}}
    draw("sd1", requests)
    draw("sd1", {f"{label}, side by side": fields for label, fields in requests.items()}, batch=4)
    draw("sd2", {"sd2": {**clip, "limit": 3}})


def tiles(draw: Draw, at: Path) -> None:
    image, preview = {"image": at / "image.png", "strength": 0.6}, {"on_step": Watch(previews=(2,))}
    draw("sd1", {"text": {**preview, "count": 2}, "picture": image, "inpaint": {**image, "mask": at / "mask.png"},
                 "small": {"height": 32, "width": 32}}, tile=32)


def latents(draw: Draw, at: Path) -> None:
    noise = np.load(at / "noise.npy")
    half = draw("sd1", {"noise": {"latents": noise, "count": 2}, "shared noise": {"latents": noise[0], "count": 2},
                        "out": {"output": "latent", "count": 2, "denoising_end": 0.5}})["out"].latents
    draw("sd1", {"in": {"image": half, "count": 2, "denoising_start": 0.5}, "one": {"image": half[1], "strength": 0.4}})


def callbacks(draw: Draw, at: Path) -> None:
    """What is cancelled, alone and beside others, keeps what it has; the others go on."""
    def requests(tag: str) -> dict[str, dict[str, Any]]:
        return {f"cancelled {tag}": {"count": 3, "on_step": Watch(previews=(1, 3), cancel=(1, 4))},
                f"at once {tag}": {"on_step": Watch(cancel=(0, 1)), "steps": 4},
                f"previews {tag}": {"on_step": Watch(previews=(2, 6)), "scheduler": "heun"},
                f"goes on {tag}": {"on_step": None, "seed": 8}}

    draw("sd1", requests("alone"))
    draw("sd1", requests("together"), batch=4)


def withheld(draw: Draw, at: Path) -> None:
    draw("sd1", {"some": {"count": 6}, "one": {"seed": 20}}, safety_checker=strict)


def mixed(draw: Draw, at: Path) -> None:
    """One call of four slots, whose requests have nothing in common."""
    image, mask = {"image": at / "image.png"}, {"mask": at / "mask.png"}
    net = Control("net0", at / "hint.png", scale=0.7)
    draw("sd1", {
        "plain": {}, "unguided": {"guidance": 1.0, "steps": 3, "scheduler": "euler_ancestral", "count": 3},
        "square": {**SQUARE, "scheduler": "heun", "steps": 5}, "net": {"control": net, "steps": 7, "count": 2},
        "other net": {"control": Control("net1", at / "other.png", end=0.5), "guidance": 1.0},
        "styled": {"loras": [at / "kohya.safetensors"], "scheduler": "unipc", "count": 2},
        "styled square": {**SQUARE, "loras": [at / "kohya.safetensors"], "guidance": 3.0},
        "other style": {"loras": [Lora(str(at / "attention.safetensors"), 0.5)], "control": net, **image},
        "picture": {**image, "strength": 0.4, "steps": 9, "scheduler": "dpm++_2m_sde", "count": 3},
        "inpaint": {**image, **mask, "blend": "before", "paste": True}, "small": {"image": at / "other.png"},
        "latent": {"latents": np.load(at / "noise.npy"), "count": 2, "output": "latent", "scheduler": "lms"},
        "long": {"prompt": LONG, "prompt_style": "weighted"}, "rescaled": {"guidance_rescale": 0.7, "seed": 2**64 - 1},
        "word": {"prompt": "a wug", "embeddings": (at / "wug.safetensors",), "scheduler": "lcm", "guidance": 1.5},
        "cancelled": {"count": 2, "on_step": Watch(previews=(1,), cancel=(1, 2))}, "unwatched": {"on_step": None},
        "video": {"frames": at / "clip", "limit": 3, "strength": 0.7}}, batch=4)
    draw("sd2", {"sd2 plain": {"count": 3}, "sd2 unguided": {"guidance": 1.0, "scheduler": "dpm++_2m_karras"},
                 "sd2 picture": {**image, "scheduler": "euler"}}, batch=4)
    draw("sdxl", {"xl plain": {"count": 3}, "xl sizes": {"crop": (4, 8), "negative_prompt": None},
                  "xl net": {"control": net}, "xl picture": {**image, "scheduler": "heun"}}, batch=4)
    draw("inpainting", {"9 channels": {**image, **mask, "count": 3}, "9 unguided": {**image, **mask, "guidance": 1.0}},
         batch=4)


def from_a_file(draw: Draw, at: Path) -> None:
    """Exported from one file in 16 bits, with another VAE."""
    draw("sd1-file", {"text": {"count": 2}, "picture": {"image": at / "image.png"},
                      "styled": {"loras": [at / "kohya.safetensors"]}, "unguided": {"guidance": 1.0}})


def shapes(draw: Draw, at: Path) -> None:
    """The model that ships, with its ControlNet and its LoRA."""
    image, told = {"image": at / "shapes-image.png"}, {"prompt": "a green star and a pink circle on a navy background"}
    edges, chalk = {"control": Control("edges", at / "shapes-hint.png")}, {"loras": [at / "red-chalk.safetensors"]}
    requests: dict[str, dict[str, Any]] = {
        "text": {"prompt": "a large red circle to the left of a small blue square", "count": 2},
        "checkpoint's own": {**told, "scheduler": None, "steps": 20}, "dpm": {**told, "scheduler": "dpm++_2m_karras"},
        "picture": {**told, **image, "strength": 0.7}, "inpaint": {**told, **image, "mask": at / "shapes-mask.png"},
        "net": {**told, **edges}, "chalk": {**told, **chalk}, "both": {**told, **edges, **chalk},
        "video": {**told, "frames": at / "shapes-clip", "strength": 0.9, "limit": 3,
                  "control": Control("edges", at / "shapes-clip", preprocessor="canny")}}
    for batch in (1, 4):
        draw("shapes", {f"{label}, batch {batch}": {**SHAPES, **fields} for label, fields in requests.items()},
             size=(64, 64), batch=batch)


CASES: dict[str, Callable[[Draw, Path], None]] = {case.__name__: case for case in (
    text_to_image, text_to_image_sd2, samplers, samplers_sd2, samplers_from_a_picture, prompts, image_to_image,
    inpaint_by_blending, inpaint_9_channels, depth, upscale, invert, xl, refiner, control_nets, loras, video, tiles,
    latents, callbacks, withheld, mixed, from_a_file, shapes)}


def brightness(image: Image.Image) -> np.ndarray:
    """A depth estimator."""
    return np.asarray(image.convert("L"), np.float32)


def strict(image: Image.Image) -> Image.Image | None:
    """A safety checker that goes by the sum of the pixels: withholds one in three, changes one, passes one."""
    kind = int(np.asarray(image, np.int64).sum()) % 3
    return None if kind == 0 else ImageOps.invert(image) if kind == 1 else image
