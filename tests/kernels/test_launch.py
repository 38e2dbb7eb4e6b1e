"""Launching artefacts through cuda.core, without torch and triton; the launches themselves need a GPU."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from kernels.aot.artefact import Artefact, KernelError, arch_for
from tests.conftest import why_no_gpu
from tests.tools.kernel_builds import PLANES, build, run_python


def test_reading_and_launching_load_neither_torch_nor_triton() -> None:
    loaded = run_python("import sys, kernels.aot.artefact, kernels.launch, kernels.host.ops, kernels.aot.build\n"
                        "print(sorted({name.partition('.')[0] for name in sys.modules}))")
    assert "'numpy'" in loaded
    assert not {"'torch'", "'triton'", "'cuda'"} & set(re.findall(r"'\w+'", loaded))


def test_launching_without_cuda_core_says_what_to_install(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.launch import Kernel

    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(KernelError, match=r"needs cuda.core .* pip install 'cuda-core"):
        Kernel(Artefact.read(built, PLANES["fp16"], "sm_90"))


@pytest.fixture(scope="module")
def for_this_gpu(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """guidance_step and to_image for the GPU that is here."""
    import torch

    if reason := why_no_gpu():
        pytest.skip(reason)
    pytest.importorskip("cuda.core", reason="cuda.core is not installed")
    major, minor = torch.cuda.get_device_capability()
    output, arch = tmp_path_factory.mktemp("gpu"), arch_for(10 * major + minor)
    build(output, tmp_path_factory.mktemp("gpu-cache"), "--op", "guidance_step,to_image", "--arch", arch)
    return output, arch


def enqueue_and_wait(enqueue: Any) -> None:
    import torch

    torch.cuda.synchronize()
    stream = pytest.importorskip("cuda.core").Device().create_stream()
    enqueue(stream)
    stream.sync()


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["planes", "interleaved"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_the_cubin_of_to_image_gives_the_bytes_of_its_reference(for_this_gpu: tuple[Path, str], dtype: str,
                                                                layout: str) -> None:
    import torch

    from kernels.launch import Kernel
    from kernels.triton import to_image

    artefact = Artefact.read(for_this_gpu[0], f"to_image_{dtype}_{layout}", for_this_gpu[1])
    x = torch.randn(2, 3, 96, 80, generator=torch.Generator().manual_seed(2))
    x = x.to("cuda", {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    out = torch.full((2, 96, 80, 3), 77, dtype=torch.uint8, device="cuda")
    block = int(artefact.constants["BLOCK"])
    grid: tuple[int, ...] = (-(-96 * 80 // (4 * block)), 2)
    size = {"pixels": 96 * 80}
    if layout == "interleaved":
        x = x.contiguous(memory_format=torch.channels_last)
        grid, size = (-(-x.numel() // block),), {"values": x.numel()}
    enqueue_and_wait(Kernel(artefact).bind(grid, x_ptr=x.data_ptr(), out_ptr=out.data_ptr(), **size))
    assert torch.equal(out.cpu(), to_image.reference(x.cpu()))


@pytest.mark.gpu
@pytest.mark.parametrize("memory", [1, 3, 7])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_the_cubin_of_guidance_step_matches_its_reference(for_this_gpu: tuple[Path, str], dtype: str,
                                                          memory: int) -> None:
    from kernels.launch import Kernel
    from tests.cases.step import check_guidance, copied, guidance_arguments

    artefact = Artefact.read(for_this_gpu[0], f"guidance_step_{dtype}_memory{memory}", for_this_gpu[1])
    arguments = guidance_arguments(images=2, memory=memory, latent=(4, 64, 64), dtype=dtype)
    run = copied(arguments)
    n, images = 4 * 64 * 64, len(run["state"])
    pointers = {f"{name}_ptr": tensor.data_ptr() for name, tensor in run.items()}
    enqueue_and_wait(Kernel(artefact).bind((-(-n // int(artefact.constants["BLOCK"])), images), **pointers, n=n,
                                           first=images, rows=run["table"].shape[1], draws=run["noise"].shape[1]))
    check_guidance(arguments, run)


@pytest.mark.gpu
def test_arguments_that_do_not_fit_the_artefact_are_refused(for_this_gpu: tuple[Path, str]) -> None:
    from kernels.launch import Kernel

    artefact = Artefact.read(for_this_gpu[0], PLANES["fp16"], for_this_gpu[1])
    kernel = Kernel(artefact)
    with pytest.raises(KernelError, match=r"got arguments .* expected"):
        kernel.bind((1,), x_ptr=0, out_ptr=0)
    with pytest.raises(KernelError, match="pixels: got 20, expected a multiple of 16"):
        kernel.bind((1,), x_ptr=0, out_ptr=0, pixels=20)
    other = "sm_80" if for_this_gpu[1] != "sm_80" else "sm_90"
    with pytest.raises(KernelError, match=f"got code for {other}, expected {for_this_gpu[1]}"):
        Kernel(dataclasses.replace(artefact, arch=other))
