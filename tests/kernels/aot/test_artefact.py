"""Reading what a build has made, without torch: signatures, code, and the errors where they are not as they were."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from kernels.aot.artefact import ARCHS, Artefact, KernelError, arch_for, artefacts
from kernels.aot.plan import MAX_SHARED
from tests.tools.kernel_builds import PLANES


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """`built` once more, to spoil."""
    return shutil.copytree(built, tmp_path / "copy")


def test_architectures_are_the_same_everywhere() -> None:
    assert tuple(MAX_SHARED) == ARCHS


def test_a_damaged_artefact_says_how_to_build_it_again(copy: Path) -> None:
    artefact = Artefact.read(copy, PLANES["fp16"], "sm_90")
    file = copy / "sm_90" / artefact.files["cubin"]
    file.write_bytes(file.read_bytes()[:-1])
    again = re.escape(f"build it again: python -m kernels build --arch sm_90 -o {copy}")
    with pytest.raises(KernelError, match=rf"is damaged; {again}"):
        artefact.code("cubin")
    file.unlink()
    with pytest.raises(KernelError, match=rf"cannot be read .*{again}"):
        artefact.code("cubin")


def test_a_kernel_that_was_not_built_says_where_there_is_one(built: Path) -> None:
    with pytest.raises(KernelError, match=r"no such kernel.*there is sm_90; build it: python -m kernels build"):
        Artefact.read(built, PLANES["bf16"], "sm_75")
    with pytest.raises(KernelError, match="there is none for any architecture"):
        Artefact.read(built, "to_image_fp64", "sm_75")


@pytest.mark.parametrize(("change", "message"), [
    ({"format": 2}, "got format 2, this version reads up to 1"), ({"color": "red"}, "got the keys"),
    ({"arguments": 3}, "not a readable"), (None, "not a readable")], ids=["newer", "unknown key", "wrong type", "cut"])
def test_a_signature_that_cannot_be_read_is_refused(copy: Path, change: dict[str, Any] | None, message: str) -> None:
    path = copy / "sm_90" / f"{PLANES['fp16']}.json"
    text = path.read_text()
    path.write_text(text[:100] if change is None else json.dumps(json.loads(text) | change))
    with pytest.raises(KernelError, match=message):
        Artefact.read(copy, PLANES["fp16"], "sm_90")


def test_signatures_round_trip(built: Path) -> None:
    for artefact in artefacts(built):
        path = artefact.directory / f"{artefact.name}.json"
        again = Artefact.from_json(json.loads(json.dumps(artefact.to_json())), path)
        assert again == artefact
        assert again.directory == path.parent


@pytest.mark.parametrize(("capability", "arch"), [(75, "sm_75"), (80, "sm_80"), (87, "sm_86"), (89, "sm_89"),
                                                  (90, "sm_90"), (100, "sm_100"), (120, "sm_120")])
def test_a_gpu_runs_the_code_of_its_architecture(capability: int, arch: str) -> None:
    assert arch_for(capability) == arch


@pytest.mark.parametrize("capability", [61, 70, 103, 110, 121])
def test_a_gpu_that_no_code_runs_on_is_refused(capability: int) -> None:
    with pytest.raises(KernelError, match=f"got {capability / 10:.1f}, expected one of 7.5, 8.0"):
        arch_for(capability)
