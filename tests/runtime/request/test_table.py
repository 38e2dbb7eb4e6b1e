"""The table of docs/tasks.md is the one that the declarations give."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.request import table
from runtime.request.option import options_of
from runtime.request.request import TASKS, Request

DOCS = Path(__file__).parents[3] / "docs" / "tasks.md"


def test_the_documentation_has_the_table(tmp_path):
    copy = tmp_path / "tasks.md"
    copy.write_text(DOCS.read_text(encoding="utf8"), encoding="utf8")
    table.main([str(copy)])
    assert copy.read_text(encoding="utf8") == DOCS.read_text(encoding="utf8"), \
        "write it again: python -m runtime.request.table"


def test_a_change_of_a_declaration_changes_the_table(monkeypatch):
    before = table.table()
    monkeypatch.setitem(options_of(Request)["strength"].__dict__, "tasks", ("video",))
    assert table.table() != before


def test_every_option_is_in_it_with_a_cell_for_each_task():
    lines = table.table().splitlines()
    rows = [line.split("|") for line in lines if line.startswith("| `")]
    assert all(len(row) == len(TASKS) + 4 for row in rows)
    assert all(f"`{name}`" in table.table() for name in options_of(Request))


def test_a_file_without_marks_is_left_alone(tmp_path):
    (tmp_path / "a.md").write_text("# nothing", encoding="utf8")
    with pytest.raises(ValueError, match=r"a\.md: got no <!-- options"):
        table.write(tmp_path / "a.md")
    assert (tmp_path / "a.md").read_text(encoding="utf8") == "# nothing"
