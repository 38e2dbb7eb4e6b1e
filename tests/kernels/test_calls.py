"""How the runtime calls its kernels, from shapes alone: the grids and numbers do what torch's launchers do.

The kernels run in Triton's interpreter, or compiled where there is a GPU, with exactly what `call` gives.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

from kernels.aot.artefact import KernelError
from kernels.calls import call
from kernels.triton import accumulate, guidance_step, step_input, to_image
from tests.cases.step import check_guidance, copied, guidance_arguments, input_arguments
from tests.cases.triton import DEVICE, random


def run(op: str, kernel: Any, constants: dict[str, int], tensors: dict[str, torch.Tensor]) -> None:
    """Launch `kernel` as the runtime would; it must be one that is built, with just these arguments."""
    asked = call(op, {name: tuple(t.shape) for name, t in tensors.items()},
                 {name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items()})
    pointers = {f"{name}_ptr": t for name, t in tensors.items()}
    kernel[asked.grid(constants["BLOCK"])](**pointers, **asked.numbers, **constants)
    (variant,) = [v for v in import_module(f"kernels.triton.{op}").variants() if v.name == asked.name]
    assert set(variant.signature) == {*pointers, *asked.numbers}


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("memory", [1, 7])
def test_guidance_step(memory: int, guided: bool) -> None:
    arguments = guidance_arguments(memory=memory, latent=(4, 36, 32), guided=guided, dtype="fp16")
    got = copied(arguments)
    run("guidance_step", guidance_step._guidance_step,
        {"MEMORY": memory, "BLOCK": guidance_step.block(memory), "CHUNK": guidance_step.CHUNK}, got)
    check_guidance(arguments, got)


@pytest.mark.parametrize("widths", [(1,), (1, 3000)], ids=["narrow", "wider than the latents"])
def test_step_input(widths: tuple[int, ...]) -> None:
    got = input_arguments(latent=(4, 16, 20), widths=widths)
    truth = copied(got)
    run("step_input", step_input._step_input, {"BLOCK": step_input.BLOCK}, got)
    step_input.reference(**truth)
    for name in ("sample", "arena"):
        torch.testing.assert_close(got[name], truth[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("keep", [0, 1])
def test_accumulate(keep: int) -> None:
    got = {"x": random(2100), "keep": torch.tensor([keep], dtype=torch.int32, device=DEVICE), "out": random(2100)}
    truth = {name: tensor.clone() for name, tensor in got.items()}
    run("accumulate", accumulate._accumulate, {"BLOCK": accumulate.BLOCK}, got)
    accumulate.reference(**truth)
    assert torch.equal(got["out"], truth["out"])


def test_to_image() -> None:
    x = random(2, 3, 40, 24)
    out = torch.full((2, 40, 24, 3), 77, dtype=torch.uint8, device=DEVICE)
    block = to_image.config(channels_last=False).block

    def kernel(grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(out_ptr: torch.Tensor, **rest: Any) -> None:
            to_image._planes[grid](out_ptr=out_ptr.view(-1).view(torch.int32), **rest)
        return launch

    class Launcher:
        __getitem__ = staticmethod(kernel)

    run("to_image", Launcher(), {"BLOCK": block}, {"x": x, "out": out})
    assert torch.equal(out, to_image.reference(x))


def test_another_op_or_dtype_is_refused() -> None:
    with pytest.raises(KernelError, match="got 'attention', expected one of step_input"):
        call("attention", {}, {})
    with pytest.raises(KernelError, match="to_image: got float64, expected one of float16"):
        call("to_image", {"x": (1, 3, 8, 8)}, {"x": "float64"})

