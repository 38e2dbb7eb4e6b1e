"""Tiny random models with the pipelines that draw with them."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from runtime import Pipeline
from tests.tools.drawn import SIZE


@pytest.fixture(scope="package")
def made(checkpoints, bundles):
    """Name in models/tiny.py → (diffusers checkpoint, our pipeline)."""

    @functools.cache
    def make(name: str) -> tuple[Path, Pipeline]:
        return checkpoints[name], Pipeline.load(bundles[name], "onnxruntime", size=SIZE, progress=False)

    return make
