"""One small build for all tests of artefacts: to_image for two architectures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools.kernel_builds import build


@pytest.fixture(scope="session")
def to_image_build(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The directories `out` and `cache` of the build."""
    def make(path: Path) -> None:
        report = build(path / "out", path / "cache", "--op", "to_image", "--arch", "sm_75,sm_90")
        assert (report["compiled"], report["cached"], report["artefacts"], report["unfit"]) == (10, 0, 10, [])

    return once("to_image kernels", make)


@pytest.fixture(scope="session")
def built(to_image_build: Path) -> Path:
    return to_image_build / "out"


@pytest.fixture(scope="session")
def cache(to_image_build: Path) -> Path:
    return to_image_build / "cache"
