"""Bundles that the tests of TensorRT build engines of."""

import shutil

import pytest

from engines.bundle import Bundle
from tests.tools.small import small_bundle


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """The small bundle by dtype; tests copy it."""
    root = tmp_path_factory.mktemp("originals")
    return {dtype: small_bundle(root / dtype, dtype).path for dtype in ("fp32", "fp16", "bf16")}


@pytest.fixture
def bundle(originals, tmp_path):
    return Bundle.open(shutil.copytree(originals["fp32"], tmp_path / "small"))


@pytest.fixture
def sd1(bundles, tmp_path):
    """A copy whose denoiser takes some seconds to build."""
    return Bundle.open(shutil.copytree(bundles["sd1"], tmp_path / "sd1", ignore=shutil.ignore_patterns("engines")))
