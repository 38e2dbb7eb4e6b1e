"""The options of `python -m runtime`: those of a request and of a pipeline as they are declared, and a few more."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engines.cli.kernel_options import add_kernel_options
from engines.cli.options import picture_size
from runtime.config import PipelineConfig
from runtime.request.option import Option, options_of, unset
from runtime.request.request import PICTURE, XL, Request

EXAMPLES = """\
examples:
  python -m runtime sd15.bundle "a photograph of an astronaut riding a horse" --seed 42 -o astronaut.png
  python -m runtime sd15.bundle "a lighthouse" --scheduler dpm++_2m_karras --steps 20 --size 512x768 --count 4
  python -m runtime sd15.bundle "a red fox" "a grey wolf" --negative "blurry" -o animals.png
  python -m runtime sd15.bundle --from astronaut.png -o again.png      the same picture again
  python -m runtime sd15.bundle "an oil painting of a fox" --image fox.jpg --strength 0.6 -o painting.png
  python -m runtime sd15.bundle "a cat on a bench" --image bench.png --mask white-is-repainted.png -o cat.png
  python -m runtime x4.bundle "a white cat" --upscale small.png -o large.png
  python -m runtime sd15.bundle "a woman with red hair" --frames walk.mp4 --every 10 --limit 10 -o hair.mp4
"""


def parser(prog: str = "python -m runtime") -> argparse.ArgumentParser:
    """Return the parser of the command line, whose values are None where an option is not given."""
    command = argparse.ArgumentParser(
        prog=prog, description="Draw pictures from prompts with an exported bundle.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("bundle", help="directory that `python -m export` wrote")
    command.add_argument("prompt", nargs="*", help=options_of(Request)["prompt"].help)
    groups = {"": command, PICTURE: command.add_argument_group(
        PICTURE, "The model says what it can do with them: python -m engines inspect BUNDLE."),
        XL: command.add_argument_group(XL)}
    add_declared(groups, Request)
    _add_to_requests(groups)
    _add_files(command.add_argument_group("files"))
    engine = command.add_argument_group("engine")
    add_declared({"": engine}, PipelineConfig)
    add_kernel_options(engine)
    engine.add_argument("--rebuild", action="store_true", help="build the engines of this size and batch again first")
    engine.add_argument("--quiet", action="store_true", help="no progress bars")
    engine.add_argument("-v", "--verbose", action="store_true", help="log what is loaded and built; tracebacks for "
                        "errors")
    return command


def add_declared(groups: Mapping[str, Any], cls: Any) -> None:
    """Add the declared options of a dataclass that have a flag, to the parser or group of their heading."""
    for name, declared in options_of(cls).items():
        if declared.flag:
            groups[declared.group].add_argument(declared.flag, dest=name, **_argument(declared, unset(cls, name)))


def _add_to_requests(groups: Mapping[str, Any]) -> None:
    """Add options that stand for several of a request, or for the value of another."""
    groups[""].add_argument("--loose-loras", action="store_true", help="leave out those parts of a LoRA that fit no "
                            "weight of the model")
    groups[""].add_argument("--size", type=picture_size, metavar="HxW", help="pixels, height first (default: the "
                            "picture's own, or the model's)")
    groups[PICTURE].add_argument("--upscale", metavar="FILE", help="enlarge this picture four times, with an upscaling "
                                 "model")
    groups[XL].add_argument("--refiner", type=Path, metavar="BUNDLE", help="go on with this bundle from "
                            "--denoising-end on (default 0.8)")


def _add_files(group: Any) -> None:
    group.add_argument("--from", dest="source", type=Path, metavar="FILE.png", help="repeat the request stored in a "
                       "picture or video; options given here change it")
    group.add_argument("-o", "--output", dest="target", type=Path, metavar="FILE", help="picture to write, numbered "
                       "when there are several (default latentrt.png, of a video latentrt in the form of --frames); "
                       "FILE.npy for its latents")
    group.add_argument("--grid", type=Path, metavar="FILE", help="also write all pictures on one")
    group.add_argument("--force", action="store_true", help="replace pictures that exist")
    group.add_argument("--json", action="store_true", help="print files, requests and timings as JSON")


def _argument(declared: Option, unset: str) -> dict[str, Any]:
    """Return what argparse is told of an option."""
    check, words = declared.check, declared.help + ("; may be given again" if declared.repeats else "")
    if unset:
        words += f" (default: {unset})" if declared.unset else f" (default {unset})"
    if check.boolean:
        return {"action": "store_const", "const": True, "help": words}
    shared = {"help": words, "action": "append" if declared.repeats else "store"}
    if check.choices:
        return {**shared, "choices": check.choices}
    return {**shared, "metavar": declared.metavar or check.metavar, "type": _shown(check.parse)}


def _shown(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return `parse` as argparse wants it: its ValueError is shown, unless argparse has better words for it."""
    if parse in (int, float, str):
        return parse

    def checked(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as e:
            raise argparse.ArgumentTypeError(str(e)) from e

    return checked
