"""Arguments of the ops of a step on which every term counts, and how far guidance_step may be from its reference."""

from __future__ import annotations

import torch

from kernels.host.step_table import DRAW, time_columns, width
from kernels.triton import guidance_step
from tests.cases.triton import DEVICE, DTYPES

UPDATED = ("state", "sample", "timestep")
"""What guidance_step writes, beside its counters."""
FLOOR = 1e-6
"""What a kernel may differ from the float64 result beside twice the error of its reference, of the largest value."""
SPACE = 20_000
"""Numbers of the arena for each time input."""

Arguments = dict[str, torch.Tensor]


def copied(arguments: Arguments, dtype: torch.dtype | None = None) -> Arguments:
    return {name: t.to(dtype if t.is_floating_point() else None, copy=True) for name, t in arguments.items()}


def guidance_arguments(images: int = 2, memory: int = 3, latent: tuple[int, ...] = (4, 6, 5), dtype: str = "fp32",
                       guided: bool = True, rows: int = 3, draws: int = 2) -> Arguments:
    """Arguments on which every term counts: each image guided, rescaled and blended, with an arbitrary table."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    table = random(images, rows, width(memory))
    table[:, :, DRAW] = torch.arange(rows)
    controls = torch.tensor([[7.5, 0.7, 1.0], [0.5, 0.2, 1.0], [3.0, 0.0, 0.0]])[torch.arange(images) % 3]
    known = random(images, 3, *latent)
    known[:, 2] = torch.rand(images, *latent, generator=generator)
    batch = images * (1 + guided)
    return {
        "noise_pred": (random(batch, *latent) * 1.5 + 0.3).to(DTYPES[dtype]).to(DEVICE),
        "noise": random(images, draws, *latent).to(DEVICE), "table": table.to(DEVICE), "controls": controls.to(DEVICE),
        "known": known.to(DEVICE), "state": random(images, 1 + memory, *latent).to(DEVICE),
        "sample": torch.full((batch, *latent), torch.nan, dtype=DTYPES[dtype], device=DEVICE),
        "timestep": torch.full((batch,), torch.nan, device=DEVICE),
        "progress": torch.tensor([[b % (rows - 1), rows, 0] for b in range(images)], dtype=torch.int32, device=DEVICE)}


def check_guidance(arguments: Arguments, run: Arguments) -> None:
    """Compare `run`, on which the kernel has worked, with the reference on `arguments`."""
    truth, own = copied(arguments, torch.float64), copied(arguments)
    guidance_step.reference(**truth)
    guidance_step.reference(**own)
    assert run["progress"].tolist() == truth["progress"].tolist()
    for name in UPDATED:
        scale = truth[name].abs().max().item()
        error = (run[name].double() - truth[name]).abs().max().item()
        allowed = 2 * (own[name].double() - truth[name]).abs().max().item() + FLOOR * scale
        assert error <= allowed, f"{name}: {error:.2e} from the float64 result, expected at most {allowed:.2e}"


def input_arguments(latent: tuple[int, ...] = (4, 6, 5), dtype: str = "fp32", guided: bool = True,
                    widths: tuple[int, ...] = (1, 70, 3)) -> Arguments:
    """Three images at rows 0 and 2 of 4 and at the end; the arena has gaps that nothing may write to."""
    generator = torch.Generator().manual_seed(4)
    images, batch, rows = 3, 3 * (1 + guided), 4
    names = [str(k) for k in range(len(widths))]
    offsets = {name: 16 + SPACE * k for k, name in enumerate(names)}
    return {
        "state": torch.randn(images, 4, *latent, generator=generator).to(DEVICE),
        "table": torch.randn(images, rows, 36, generator=generator).to(DEVICE),
        "progress": torch.tensor([[0, 4, 0], [2, 3, 0], [4, 4, 0]], dtype=torch.int32, device=DEVICE),
        "times": torch.randn(images, rows, sum(widths), generator=generator).to(DEVICE),
        "columns": torch.from_numpy(time_columns(dict(zip(names, widths, strict=True)), offsets)).to(DEVICE),
        "sample": torch.full((batch, *latent), torch.nan, dtype=DTYPES[dtype], device=DEVICE),
        "arena": torch.full((16 + SPACE * len(widths),), torch.nan, device=DEVICE)}
