"""The classes of diffusers are quiet here, and torch takes one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers.utils import logging


@pytest.fixture(autouse=True, scope="module")
def _quiet_and_single_threaded() -> Iterator[None]:
    verbosity, threads = logging.get_verbosity(), torch.get_num_threads()
    logging.set_verbosity(logging.CRITICAL)
    torch.set_num_threads(1)
    yield
    logging.set_verbosity(verbosity)
    torch.set_num_threads(threads)
