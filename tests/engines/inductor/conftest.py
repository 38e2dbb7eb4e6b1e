"""Compiling without trying out instruction sets, in every test of this room."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Takes the instruction sets that the CPU names for granted, which each build would try out for several seconds."""
    pytest.importorskip("torch")
    import torch._inductor.config as settings

    with settings.patch({"cpp.vec_isa_ok": True}):
        yield
