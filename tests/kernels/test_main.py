"""`python -m kernels`: options that it refuses, and its lists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kernels.aot.artefact import artefacts
from kernels.aot.plan import OPS
from tests.tools.kernel_builds import cli


def test_interpreted_kernels_are_not_built(tmp_path: Path) -> None:
    done = cli("build", "--op", "to_image", "--arch", "sm_90", "-o", tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: got kernels that Triton interprets")
    assert "unset TRITON_INTERPRET" in done.stderr


@pytest.mark.parametrize(("arguments", "message"), [
    (("--arch", "sm_90,sm_91"), "got 'sm_91', expected some of sm_75,sm_80"),
    (("--op", "softmax"), "got softmax, expected some of attention"),
    (("-j", "0"), "got '0', expected a whole number of at least 1")], ids=["arch", "op", "jobs"])
def test_options_that_cannot_be_are_refused(arguments: tuple[str, ...], message: str) -> None:
    done = cli("build", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_every_op_has_variants_that_fit_their_kernels() -> None:
    """Listing them compares names, types and constants of each with the arguments of its kernel."""
    done = cli("list", "--json")
    assert done.returncode == 0, done.stderr
    assert {variant["op"] for variant in json.loads(done.stdout)} == set(OPS)


def test_list_shows_what_was_built(built: Path) -> None:
    done = cli("list", built, "--json")
    assert done.returncode == 0, done.stderr
    assert [a["name"] for a in json.loads(done.stdout)] == [a.name for a in artefacts(built)]
    table = cli("list", built, "--op", "to_image").stdout.splitlines()
    assert table[0].split() == ["arch", "name", "entry", "threads", "shared", "cubin"]
    assert len(table) == 1 + len(list(artefacts(built)))
