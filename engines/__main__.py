"""python -m engines {list,build,inspect,verify}: see what is there, build it, look inside, check it."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from engines.cli import build, inspect, list, verify
from engines.cli.interrupt import interruptible
from engines.spec import EngineError

COMMANDS = {"list": list, "build": build, "inspect": inspect, "verify": verify}
"""Name of a command → the file that declares its options and runs it."""

EXAMPLES = """examples:
  {prog} list                                        backends of this machine
  {prog} list sd15.bundle                            and the engines of a bundle
  {prog} build sd15.bundle                           those that auto picks here
  {prog} build sd15.bundle --backend openvino --dtype bf16 --attention ours
  {prog} build sd15.bundle --backend onnxruntime --size 512x512 768x512 --batch 1 4
  {prog} build sd15.bundle --backend tensorrt-rtx --device sm_89 --dtype auto
  {prog} inspect sd15.bundle                         components, shapes, provenance, engines
  {prog} inspect sd15.bundle --engine unet-openvino --profile
                                                                kernels and what is slow in these engines
  {prog} verify sd15.bundle                          hash every file, compare every engine again
"""


def main(arguments: Sequence[str] | None = None, prog: str = "python -m engines") -> int:
    """Run one command; returns the exit status: 0, 1 where `verify` found something, 2 for an error, 130 for Ctrl-C."""
    options = parser(prog).parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    try:
        with interruptible():
            return options.run(options)
    except (EngineError, ValueError) as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing half-built was kept", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0


def parser(prog: str = "python -m engines") -> argparse.ArgumentParser:
    """Return the command line: one subcommand a file of COMMANDS."""
    whole = argparse.ArgumentParser(prog=prog, description=__doc__, epilog=EXAMPLES.format(prog=prog),
                                    formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print JSON instead of a table")
    shared.add_argument("-v", "--verbose", action="store_true", help="say what is being done")
    commands = whole.add_subparsers(required=True, metavar=f"{{{','.join(COMMANDS)}}}")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, parents=[shared], help=command.ABOUT, description=command.ABOUT)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return whole


if __name__ == "__main__":
    sys.exit(main())
