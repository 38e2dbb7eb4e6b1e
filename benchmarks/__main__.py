"""`python -m benchmarks {quality,unet}`: what the engines reach, measured side by side in one run."""

from __future__ import annotations

import argparse
import sys

from benchmarks import quality, unet
from engines import EngineError

COMMANDS = {"quality": quality, "unet": unet}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, module in COMMANDS.items():
        doc = module.__doc__ or ""
        module.add_arguments(commands.add_parser(name, help=doc.splitlines()[0], description=doc,
                                                 formatter_class=argparse.RawDescriptionHelpFormatter))
    args = parser.parse_args(argv)
    try:
        return COMMANDS[args.command].run(args)
    except KeyboardInterrupt:
        return 130
    except (EngineError, ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
