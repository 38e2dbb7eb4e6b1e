"""The runtime's GPU side, all but the GPU: see tests/tools/emulated.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engines.store.runtime_kernels import runtime_kernels
from tests.conftest import why_no_gpu
from tests.tools.small import small_bundle

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(why_no_gpu() is None, reason="is about a machine without an NVIDIA GPU")
def test_the_loop_runs_on_cuda_core_with_a_driver_that_stands_in(tmp_path: Path, kernel_cache: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.core", reason="cuda.core is not installed: pip install cuda-core cuda-bindings")
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(kernel_cache))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernels = runtime_kernels(small_bundle(tmp_path / "small"), "sm_75")
    driver = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", driver, ROOT / "tests" / "fake_driver.c", "-ldl"],
                   check=True)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    done = subprocess.run([sys.executable, "-m", "tests.tools.emulated", driver, kernels], cwd=ROOT, text=True,
                          check=False, capture_output=True, env={**os.environ, "LD_LIBRARY_PATH": path})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["jobs_end_where_each_ends_alone", "a_refit_reaches_what_was_captured",
                                   "pictures_are_those_of_numpy", "memory_goes_there_and_back"]
