"""Make what `python -m tests.record` draws from: tiny random checkpoints, LoRAs, embeddings, pictures, videos.

    python -m tests.record.inputs CASES

It is run once; the files are then kept, so that what is drawn before and after a change begins with the same bytes.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

from benchmarks.harness.task_cases import DEPTH, SIZE, disc, picture
from models import tiny
from models.world import drawing, placed
from models.world.scenes import RADII, Layout, Object, Scene
from runtime.pictures import video
from tests.tools import compvis

ROOT = Path(__file__).parents[2]
FRAMES = 5


def checkpoints(at: Path) -> None:
    for name in ("inpainting", "inpainting_2", "depth", "upscaler", "sdxl", "refiner"):
        getattr(tiny, name)(at / name)
    tiny.sd1(at / "sd1", levels=2)
    tiny.sd2(at / "sd2", levels=2)
    for seed, name in enumerate(("net0", "net1")):
        tiny.control(at / name, at / "sd1", seed=seed)
    tiny.control(at / "net-xl", at / "sdxl", seed=2)
    tiny.vae(at / "vae", seed=9)
    compvis.save(compvis.from_folder(at / "sd1"), at / "sd1.safetensors")
    for name in ("shapes", "shapes-edges"):
        shutil.copytree(ROOT / "models" / name, at / name)
    shutil.copy(ROOT / "models/shapes-red-chalk/pytorch_lora_weights.safetensors", at / "red-chalk.safetensors")


def adapters(at: Path) -> None:
    """LoRAs in three dialects, of which "attention" is PEFT's and of the UNet alone; textual inversions."""
    import diffusers

    from tests.runtime.lora.test_lora import ALPHA, ATTENTION, EVERYTHING, TEXT, original_names, pairs, write_kohya

    sd1 = diffusers.StableDiffusionPipeline.from_pretrained(at / "sd1", safety_checker=None)
    write_kohya(at / "kohya.safetensors", sd1)
    save_file({f"unet.{name}.lora_{half}.weight": factor for name, both in pairs(sd1.unet, ATTENTION, seed=5).items()
               for half, factor in zip("AB", both, strict=True)}, at / "attention.safetensors")
    xl = diffusers.StableDiffusionXLPipeline.from_pretrained(at / "sdxl")
    tensors: dict[str, np.ndarray] = {}
    names = {layer: name for name, layer in original_names(pairs(xl.unet, ".*", seed=0)).items()}
    for seed, (prefix, part, pattern) in enumerate((("unet", xl.unet, EVERYTHING), ("te1", xl.text_encoder, TEXT),
                                                    ("te2", xl.text_encoder_2, TEXT))):
        for name, (down, up) in pairs(part, pattern, seed).items():
            spelled = names[name] if prefix == "unet" else f"text_model.{name.removeprefix('text_model.')}"
            key = f"lora_{prefix}_{spelled.replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": ALPHA}
    save_file(tensors, at / "xl-kohya.safetensors")
    rng = np.random.default_rng(4)
    widths = [next(value.shape[1] for name, value in load_file(at / "sdxl" / part / "model.safetensors").items()
                   if name.endswith("token_embedding.weight")) for part in ("text_encoder", "text_encoder_2")]
    vectors = [rng.standard_normal((2, width)).astype(np.float32) * np.float32(0.1) for width in widths]
    save_file({"wug": vectors[0]}, at / "wug.safetensors")
    save_file(dict(zip(("clip_l", "clip_g"), vectors, strict=True)), at / "wug-xl.safetensors")


def pictures(at: Path) -> None:
    drawn = {"image": picture(*SIZE), "mask": disc(*SIZE), "hint": picture(*SIZE, seed=1),
             "other": picture(40, 90, seed=2), "low": picture(SIZE[0] // 4, SIZE[1] // 4, seed=1)}
    for name, pixels in drawn.items():
        Image.fromarray(pixels).save(at / f"{name}.png")
    np.save(at / "depth.npy", DEPTH)
    np.save(at / "noise.npy", np.random.default_rng(8).standard_normal((2, 4, 8, 16)).astype(np.float32))
    for name, seed in (("clip", 0), ("hints", 1)):
        frames = [Image.fromarray(np.roll(picture(*SIZE, seed=seed), 9 * n, axis=1)) for n in range(FRAMES)]
        for target in (name, f"{name}.gif", f"{name}.mp4"):
            video.write(frames, at / target, rate=8.0)


def shapes(at: Path) -> None:
    """Drawings for the model that ships: a picture with its mask and edges, and a video of a star and a circle."""
    def layout(step: int) -> Layout:
        things = (Object("star", "red", "large"), Object("circle", "blue", "small"))
        return Layout(Scene(things, (None,), "white"), tuple(RADII[size] for size in ("large", "small")),
                      ((16.0 + 4 * step, 44.0), (44.0 - 4 * step, 16.0)))

    frames = drawing.draw([layout(step) for step in range(FRAMES)])
    video.write([Image.fromarray(frame) for frame in frames], at / "shapes-clip", rate=8.0)
    Image.fromarray(frames[0]).save(at / "shapes-image.png")
    Image.fromarray(placed.edges(frames[:1])[0]).convert("RGB").save(at / "shapes-hint.png")
    mask = np.zeros_like(frames[0])
    mask[:, 32:] = 255
    Image.fromarray(mask).save(at / "shapes-mask.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path, metavar="CASES_DIR", help="directory to write; there must be none yet")
    at = parser.parse_args().cases
    at.mkdir(parents=True)
    for make in (checkpoints, adapters, pictures, shapes):
        make(at)


if __name__ == "__main__":
    main()
