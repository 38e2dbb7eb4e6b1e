"""The library of the C++ kernels: its C interface refuses for itself, and an error says what to do without it."""

import ctypes

import numpy as np
import pytest

from kernels.cpu import cpp, library

if reason := library.available():
    pytest.skip(reason, allow_module_level=True)


def test_the_c_interface_refuses_for_itself():
    kernels = library.load(library.LIBRARY)
    args = library.AttentionArgs(batch=1, heads=1, queries=1, keys=1, head_dim=12, threads=1)
    status = kernels.latentrt_attention(ctypes.byref(args))
    assert b"multiple of 8" in kernels.latentrt_status_text(status)
    assert kernels.latentrt_attention(None) and kernels.latentrt_group_norm(None)
    assert all(kernels.latentrt_status_text(i) for i in range(-1, 12))


def test_missing_library(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "none.so")
    assert "install CMake" in library.available()
    with pytest.raises(library.CpuKernelError, match="expected the C\\+\\+ kernels"):
        cpp.attention(*np.zeros((3, 1, 2, 8, 16), np.float32))
    (tmp_path / "none.so").write_bytes(b"no library")
    with pytest.raises(library.CpuKernelError, match="does not load"):
        library.isas()
