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

EXAMPLES = (
    ("list", "backends of this machine"),
    ("list sd15.bundle", "and the engines of a bundle"),
    ("build sd15.bundle", "those that auto picks here"),
    ("build sd15.bundle --backend openvino --dtype bf16 --attention ours", ""),
    ("build sd15.bundle --backend onnxruntime --size 512x512 768x512 --batch 1 4", ""),
    ("build sd15.bundle --backend tensorrt-rtx --device sm_89 --dtype auto", ""),
    ("inspect sd15.bundle", "components, shapes, provenance, engines"),
    ("inspect sd15.bundle --engine unet-openvino --profile", "kernels and what is slow in these engines"),
    ("verify sd15.bundle", "hash every file, compare every engine again"))
"""Words after the program's name, and what they show."""


def main(arguments: Sequence[str] | None = None, prog: str = "python -m engines") -> int:
    """Run one command and return its exit status.

    0: well; 1: `verify` found something; 2: an error, in one line on stderr; 130: Ctrl-C.
    """
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
    width = max(len(words) for words, text in EXAMPLES if text)
    examples = "\n".join(f"  {prog} {words:{width}}  {text}".rstrip() for words, text in EXAMPLES)
    whole = argparse.ArgumentParser(prog=prog, description=__doc__, epilog=f"examples:\n{examples}",
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
