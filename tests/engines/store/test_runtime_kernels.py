"""What the runtime launches on a GPU is compiled beside the engines, on a machine without one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engines import EngineError, store
from engines.bundle import Bundle
from engines.store.runtime_kernels import NEEDED, runtime_kernels
from kernels.aot.artefact import Artefact, artefacts
from tests.tools.small import small_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("bundle") / "small")


def test_without_a_compiler_the_error_names_the_command(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # Triton then compiles nothing
    with pytest.raises(EngineError, match=r"for sm_86 could not be compiled: .* run: python -m kernels build "
                                          r"--op step_input,accumulate,guidance_step,to_image --arch sm_86 "
                                          r"-o .*kernels-\w{12}"):
        runtime_kernels(bundle, "sm_87")
    assert not list(store.engine_directories(bundle))


def test_a_gpu_that_no_kernel_is_for_is_refused(bundle: Bundle) -> None:
    with pytest.raises(EngineError, match=r"got 12.1, expected one of 7.5"):
        runtime_kernels(bundle, "sm_121")


def test_they_are_built_once_and_again_where_one_is_damaged(bundle: Bundle, monkeypatch: pytest.MonkeyPatch,
                                                            kernel_cache: Path) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(kernel_cache))
    directory = runtime_kernels(bundle, "sm_75")
    assert directory.parent == bundle.path / "engines"
    assert {a.arch for a in artefacts(directory)} == {"sm_75"} and set(NEEDED) <= {a.name for a in artefacts(directory)}
    assert not list(store.engine_directories(bundle)), "kernels are no engine"
    made = {path: os.stat(path).st_mtime_ns for path in directory.rglob("*.cubin")}
    assert runtime_kernels(bundle, "sm_75") == directory
    assert {path: os.stat(path).st_mtime_ns for path in directory.rglob("*.cubin")} == made
    artefact = Artefact.read(directory, NEEDED[0], "sm_75")
    (artefact.directory / artefact.files["cubin"]).write_bytes(b"damaged")
    assert runtime_kernels(bundle, "sm_75") == directory
    artefact.code("cubin")
