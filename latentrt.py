# PYTHON_ARGCOMPLETE_OK
"""`latentrt export | engines | draw | bench …`: every command line of latentrt under one name.

They do what `python -m export`, `engines`, `runtime` and `benchmarks` do. Nothing is imported before it is known which
one is asked for.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Collection, Sequence
from importlib import metadata
from typing import NamedTuple


class Command(NamedTuple):
    """A command is one of the command lines.

    package: its `__main__` has `main(arguments, prog)`, which returns the exit status. parser: "module:function", which
    returns the parser. help: one line.
    """

    package: str
    parser: str
    help: str


COMMANDS = {
    "export": Command("export", "export.options:make_parser",
                      "turn a checkpoint into a bundle; add a ControlNet or a VAE"),
    "engines": Command("engines", "engines.__main__:parser",
                       "list, build, inspect and verify the engines of a bundle"),
    "draw": Command("runtime", "runtime.cli.options:parser", "draw pictures from prompts, pictures and videos"),
    "bench": Command("benchmarks", "benchmarks.__main__:parser", "measure tasks, quality and speed, beside others"),
}

EXAMPLES = """\
example, from a checkpoint to a picture:
  latentrt export stable-diffusion-v1-5 -o sd15.bundle          a diffusers folder or one file, once
  latentrt engines build sd15.bundle                            the engines that suit this machine, once
  latentrt draw sd15.bundle "a lighthouse at dawn" -o lighthouse.png

latentrt COMMAND --help explains a command, with examples. Completion in bash and zsh:
  pip install 'latentrt[completion]'
  eval "$(register-python-argcomplete latentrt)"                in ~/.bashrc or ~/.zshrc
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status, 2 where the command line is wrong."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if "_ARGCOMPLETE" in os.environ:  # a shell asks how the line may go on
        _complete(os.environ.get("COMP_LINE", "").split()[1:2])
    if words and words[0] in COMMANDS:
        return _run(words[0], words[1:])
    outer = parser()
    outer.parse_args(words)  # ends the process for --help, --version and what is unknown
    outer.print_help(sys.stderr)
    return 2


def parser(commands: Collection[str] = ()) -> argparse.ArgumentParser:
    """Return the parser of the command line, with the options of those commands only that are named.

    Only their packages are imported.
    """
    outer = argparse.ArgumentParser(
        prog="latentrt", description="A compiled inference runtime for latent diffusion.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    outer.add_argument("--version", action="version", version=f"latentrt {metadata.version('latentrt')}")
    subparsers = outer.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        if name in commands:
            module, _, function = command.parser.partition(":")
            inner = getattr(importlib.import_module(module), function)()
            subparsers.add_parser(name, help=command.help, parents=[inner], add_help=False)
        else:
            subparsers.add_parser(name, help=command.help)
    return outer


def _run(name: str, words: list[str]) -> int:
    try:
        module = importlib.import_module(f"{COMMANDS[name].package}.__main__")
    except ModuleNotFoundError as e:
        if name != "bench":
            raise
        what = "package benchmarks, which is in the repository only" if e.name == "benchmarks" else e.name
        print(f"error: bench: got no {what}, expected a checkout of latentrt with all that it measures; in it run: "
              "pip install -e '.[benchmarks]'", file=sys.stderr)
        return 2
    status: int = module.main(words, prog=f"latentrt {name}")
    return status


def _complete(commands: Collection[str]) -> None:
    """Answer the shell and end the process, where argcomplete is installed. commands: those that the line has."""
    try:
        import argcomplete
    except ModuleNotFoundError:
        return
    argcomplete.autocomplete(parser(commands))


if __name__ == "__main__":
    sys.exit(main())
