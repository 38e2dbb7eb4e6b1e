"""The table of docs/tasks.md: which task has which option, as the options are declared.

    python -m runtime.request.table             writes it into docs/tasks.md of the working directory
    python -m runtime.request.table FILE        into another file that has the two marks
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from runtime.request.option import Option, options_of, unset
from runtime.request.request import TASKS, Request

BEGIN, END = "<!-- options: `python -m runtime.request.table` writes this -->", "<!-- end of options -->"


def table() -> str:
    """Return the options that every task has, and a table with a row for each of the others, as Markdown."""
    options = options_of(Request)
    everywhere = [name for name, declared in options.items()
                  if not (declared.tasks or declared.only or declared.condition)]
    rows = [[_named(name, declared), *(_cell(declared, task) for task in TASKS), unset(Request, name)]
            for name, declared in options.items() if name not in everywhere]
    lines = [["option", *TASKS, "where it is not given"], ["---", *[":-:"] * len(TASKS), "---"], *rows]
    return "\n".join([
        _paragraph(f"Every task has {', '.join(f'`{name}`' for name in everywhere)}. The others:"), "",
        *(f"| {' | '.join(line)} |" for line in lines), "",
        _paragraph("●: the task needs it. ○: it may be given. ◇: it may be given where the model is told it. A word: "
                   "no other value is taken.")])


def write(file: Path) -> None:
    """Put the table between the two marks of a file. Raises ValueError where they are not in it."""
    text = file.read_text(encoding="utf8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{file}: got no {BEGIN} with {END} after it, expected both; write them where the table goes")
    file.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf8")


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_on_hyphens=False)


def _named(name: str, option: Option) -> str:
    return f"`{name}`" + (f", `{option.flag}`" if option.flag and option.flag != f"--{name.replace('_', '-')}" else "")


def _cell(option: Option, task: str) -> str:
    if option.tasks is not None and task not in option.tasks:
        return ""
    if task in option.only:
        return str(option.only[task][0])
    return "●" if option.needed else "◇" if option.condition else "○"


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m runtime.request.table", description="Write the table of tasks and "
                                     "options, which follows from the declarations in runtime/request/request.py, into "
                                     "the documentation.")
    parser.add_argument("file", nargs="?", type=Path, default=Path("docs/tasks.md"), help="Markdown with the two marks "
                        "(default %(default)s)")
    write(parser.parse_args(argv).file)


if __name__ == "__main__":
    main()
