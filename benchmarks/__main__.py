"""`python -m benchmarks {tasks,quality,unet,vae,pipeline,graphs,kernels}`: what is reached, measured in one run."""

from __future__ import annotations

import argparse
import importlib
import sys

from engines import EngineError
from engines.cli.interrupt import interruptible
from export import ExportError

COMMANDS = {
    "tasks": "every task on every engine: does it run, and how far is it from the reference?",
    "quality": "pictures: does each hold what its caption asks for?",
    "unet": "UNet steps: our engines beside diffusers, torch.compile, OpenVINO and ONNX Runtime",
    "vae": "VAE decoding: as unet",
    "pipeline": "prompt to picture: our engines beside diffusers and torch.compile",
    "graphs": "CUDA graphs on and off, on a GPU",
    "kernels": "kernels: ours, torch's own, torch.compile's and the physical limit",
}
"""A module each, imported when it is asked for: kernels are measured on machines that have nothing else installed."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="\n".join(f"  {name:8}  {text}" for name, text in COMMANDS.items()))
    parser.add_argument("command", choices=COMMANDS, metavar="{" + ",".join(COMMANDS) + "}")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="…", help="of the command; try COMMAND --help")
    chosen = parser.parse_args(argv)
    module = importlib.import_module(f"benchmarks.{chosen.command}")
    command = argparse.ArgumentParser(prog=f"python -m benchmarks {chosen.command}", description=module.__doc__,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
    module.add_arguments(command)
    args = command.parse_args(chosen.arguments)
    try:
        with interruptible():
            return module.run(args)
    except KeyboardInterrupt:
        return 130
    except (EngineError, ExportError, ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
