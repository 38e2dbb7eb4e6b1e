"""Small bundles of every precision."""

import shutil

import pytest

from engines.bundle import Bundle
from tests.tools.small import small_bundle


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    return {(dtype, external): small_bundle(root / f"{dtype}-{external}", dtype, external).path
            for dtype in ("fp32", "fp16", "bf16") for external in (True, False)}


@pytest.fixture
def bundle(originals, tmp_path):
    return Bundle.open(shutil.copytree(originals["fp32", True], tmp_path / "small"))
