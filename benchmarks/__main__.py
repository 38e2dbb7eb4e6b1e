"""Measure what is reached: which tasks run, how good pictures are, how fast kernels, networks and pipeline."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Collection, Sequence

from engines import EngineError
from engines.cli.interrupt import interruptible
from export import ExportError

COMMANDS = {
    "tasks": "every task on every engine: does it run, and how far is it from the reference?",
    "quality": "pictures: does each hold what its caption asks for?",
    "trajectory": "whole denoisings: does the error of an engine grow from step to step?",
    "unet": "UNet steps: our engines beside diffusers, torch.compile, OpenVINO and ONNX Runtime",
    "vae": "VAE decoding: as unet",
    "pipeline": "prompt to picture: our engines beside diffusers and torch.compile",
    "graphs": "CUDA graphs on and off, on a GPU",
    "kernels": "kernels: ours, torch's own, torch.compile's and the physical limit",
}
"""Command → one line of help. Each is a module, imported when it is asked for: kernels are measured on machines that
have nothing else installed."""

EXAMPLES = """examples:
  python -m benchmarks tasks --engines openvino-fp32 openvino-bf16      what works here, in a minute or two
  python -m benchmarks unet --random sd1 --rounds 3                     speed at Stable Diffusion 1.5's size
  python -m benchmarks COMMAND --help                                   options, examples and how to read the figures
"""


def parser(commands: Collection[str] = COMMANDS, prog: str = "python -m benchmarks") -> argparse.ArgumentParser:
    """Return the parser of the command line, with the options of those commands only that are named.

    Only their modules are imported.
    """
    outer = argparse.ArgumentParser(prog=prog, description=__doc__, epilog=EXAMPLES,
                                    formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = outer.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for name, text in COMMANDS.items():
        if name not in commands:
            subparsers.add_parser(name, help=text)
            continue
        module = importlib.import_module(f"benchmarks.{name}")
        command = subparsers.add_parser(name, help=text, description=module.__doc__,
                                        formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return outer


def main(arguments: Sequence[str] | None = None, prog: str = "python -m benchmarks") -> int:
    """Run one command; return its exit status, 2 for an error, 130 for Ctrl-C."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    args = parser(words[:1], prog).parse_args(words, argparse.Namespace(words=words))
    try:
        with interruptible():
            status: int = args.run(args)
            return status
    except KeyboardInterrupt:
        return 130
    except (EngineError, ExportError, ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
