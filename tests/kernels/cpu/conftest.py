"""LATENTRT_TEST_LIBRARY names another build of the C++ kernels to test, as `make cpp-asan` does."""

from __future__ import annotations

import os
from pathlib import Path

from kernels.cpu import library

if path := os.environ.get("LATENTRT_TEST_LIBRARY"):
    library.LIBRARY = Path(path)
    library.isas()  # which was asked for, so its absence is an error
