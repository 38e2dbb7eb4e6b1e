"""`latentrt`: the four command lines under one name, what it costs to start, and completion."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import latentrt

ROOT = Path(__file__).resolve().parent.parent
VERSION = f"latentrt {importlib.metadata.version('latentrt')}"
SECONDS_TO_START = 0.3
SUBCOMMANDS = {"export": "--into", "engines": "verify", "draw": "--strength", "bench": "trajectory"}
"""Command → a word that only its own help has."""


def test_the_version_is_the_distribution_s(capsys):
    with pytest.raises(SystemExit) as end:
        latentrt.main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out.strip() == VERSION


def test_help_names_every_command_and_shows_an_example(capsys):
    with pytest.raises(SystemExit) as end:
        latentrt.main(["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    words = " ".join(out.split())
    assert all(f"{name} {command.help}" in words for name, command in latentrt.COMMANDS.items())
    assert "latentrt export stable-diffusion-v1-5 -o sd15.bundle" in out


def test_every_command_explains_itself_in_one_process(capsys):
    assert set(SUBCOMMANDS) == set(latentrt.COMMANDS)
    for name, word in SUBCOMMANDS.items():
        with pytest.raises(SystemExit) as end:
            latentrt.main([name, "--help"])
        out = capsys.readouterr().out
        assert end.value.code == 0 and out.startswith(f"usage: latentrt {name}") and word in out


@pytest.mark.parametrize("words", [["paint"], ["--colour"], ["draw"], ["engines"], ["export", "x"], ["bench", "speed"]])
def test_a_wrong_command_line_is_status_2(words, capsys):
    with pytest.raises(SystemExit) as end:
        latentrt.main(words)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("usage: latentrt") and "error: " in error


def test_an_unknown_command_is_told_which_there_are(capsys):
    with pytest.raises(SystemExit):
        latentrt.main(["paint"])
    error = capsys.readouterr().err
    assert "'paint'" in error and all(f"'{name}'" in error for name in latentrt.COMMANDS)


def test_without_a_command_it_says_what_there_is(capsys):
    assert latentrt.main([]) == 2
    assert "commands:" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["draw", "nowhere.bundle", "a cat"], ["engines", "list", "nowhere.bundle"],
                                   ["bench", "trajectory", "nowhere.bundle"]], ids=lambda words: words[0])
def test_the_status_is_the_command_s(words, capsys):
    assert latentrt.main(words) == 2
    assert "error: nowhere.bundle: got nothing, expected a bundle" in capsys.readouterr().err


def test_a_command_that_succeeds_is_status_0(capsys):
    assert latentrt.main(["bench", "tasks", "--list"]) == 0
    assert "text-to-image" in capsys.readouterr().out


def test_without_the_benchmarks_it_says_where_they_are(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    finders = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
    monkeypatch.setattr(sys, "meta_path", finders)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path or ".").resolve() != ROOT])
    importlib.invalidate_caches()
    assert latentrt.main(["bench", "tasks"]) == 2
    error = capsys.readouterr().err
    assert "got no package benchmarks, which is in the repository only" in error and "pip install -e" in error


def started(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `latentrt WORDS` in a process of its own, which tells what it imports."""
    return subprocess.run([sys.executable, "-X", "importtime", "-m", "latentrt", *words], cwd=ROOT, text=True,
                          capture_output=True, timeout=300, env={**os.environ, **environment})


def test_its_version_is_told_at_once():
    """By the CPU's clock, the best of three, so that a busy machine does not decide."""
    seconds = []
    for _ in range(3):
        before = os.times()
        done = started("--version")
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert done.returncode == 0 and done.stdout.strip() == VERSION
    assert min(seconds) < SECONDS_TO_START
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "numpy", "argcomplete", *(c.package for c in latentrt.COMMANDS.values())}


def test_pip_installs_it_as_a_command():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]["scripts"]
    assert scripts == {"latentrt": "latentrt:main"}
    assert 'py_modules=["latentrt"]' in (ROOT / "setup.py").read_text(encoding="utf8")


@pytest.mark.parametrize(("line", "expected"), [
    ("latentrt ", {"export", "engines", "draw", "bench"}),
    ("latentrt d", {"draw"}),
    ("latentrt export --det", {"--detach"}),
    ("latentrt engines ins", {"inspect"}),
    ("latentrt engines build x --backend open", {"openvino"}),
    ("latentrt draw x --stre", {"--strength"}),
    ("latentrt bench traj", {"trajectory"}),
    ("latentrt bench kernels --no-c", {"--no-compile"}),
])
def test_a_shell_completes(line, expected, tmp_path):
    pytest.importorskip("argcomplete", reason="needs argcomplete: pip install 'latentrt[completion]'")
    answer = tmp_path / "answer"
    done = started(_ARGCOMPLETE="1", _ARGCOMPLETE_IFS="\n", _ARGCOMPLETE_STDOUT_FILENAME=str(answer), COMP_LINE=line,
                   COMP_POINT=str(len(line)))
    assert done.returncode == 0, done.stderr
    assert {word.strip() for word in answer.read_text().split("\n")} >= expected


def test_without_argcomplete_a_shell_gets_no_answer_and_no_error(monkeypatch, capsys):
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    monkeypatch.setenv("COMP_LINE", "latentrt d")
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    assert latentrt.main([]) == 2
    assert "Traceback" not in capsys.readouterr().err
