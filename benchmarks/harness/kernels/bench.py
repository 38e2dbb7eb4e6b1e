"""A bench measures one op at one shape: latentrt's kernel, its peers and the physical limits.

Peers get the layout that a model gives them, [batch, tokens, heads, head dim] seen heads first for attention, and
everyone allocates the output. The limits are a copy of as many bytes as the op has to move, and for attention a large
matrix product in the same dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import cases
from benchmarks.harness import limits, measure

Run = Callable[..., Any]

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, full) for name, full in limits.DTYPES.items()}


@dataclass(frozen=True)
class Setting:
    """The setting is what all shapes of one run share; threads and instruction sets count on a CPU only."""

    device: str
    compile: bool
    channels_last: bool
    threads: int
    isas: tuple[str, ...]


@dataclass(frozen=True)
class Call:
    """`run(*inputs)` gives the result, or a tuple that begins with it. It may write to its inputs."""

    run: Run
    inputs: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Bench:
    """A bench is one op at one shape.

    ours, peers: by name; the first peer is torch's own op, which sets the tolerance. truth: gives the result in float64
    (bytes for pictures) for `inputs`. moved: bytes that must be read and written. flops: operations of its matrix
    products. floor: share of the truth that the error may be beside twice torch's own.
    """

    op: str
    case: str
    dtype: str
    inputs: tuple[torch.Tensor, ...]
    ours: dict[str, Run]
    peers: dict[str, Run]
    truth: Callable[..., torch.Tensor]
    moved: int
    flops: int
    floor: float

    def limits(self) -> dict[str, Call]:
        """Return copy and matrix product, by name. They are timed like everyone else."""
        device, dtype = self.inputs[0].device, DTYPES[self.dtype]
        source = torch.ones(self.moved // 2, dtype=torch.uint8, device=device)
        calls = {"copy": Call(lambda source, out: out.copy_(source), (source, torch.empty_like(source)))}
        if self.flops:
            calls["matmul"] = Call(torch.matmul, _matrices(measure.MATRIX_SIDE[device.type], dtype, device))
        return calls

    def verify(self, got: torch.Tensor, framework: torch.Tensor) -> None:
        """Raise AssertionError where `got` is further from the truth than the tests of the kernels allow."""
        truth = self.truth(*(t.clone() for t in self.inputs))
        assert got.shape == truth.shape, f"got shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
        if not truth.is_floating_point():
            different = int((got != truth).sum())
            assert not different, f"{different} of {truth.numel()} bytes differ from the reference, expected none"
            return
        for name, norm in (("RMS", _rms), ("largest", _largest)):
            ours, theirs = norm(got.double() - truth), norm(framework.double() - truth)
            limit = cases.most_error(theirs, norm(truth), self.floor)
            assert ours <= limit, f"{name} error {ours:.3g}, expected at most {limit:.3g} (torch's is {theirs:.3g})"


def random(*shape: int, dtype: str, setting: Setting, seed: int = 0, channels_last: bool = False) -> torch.Tensor:
    """Return standard normal values, rounded to `dtype`, on the setting's device; the same ones on every device."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DTYPES[dtype]).to(setting.device)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def peers(eager: Run, setting: Setting) -> dict[str, Run]:
    """Return torch's own op, and torch.compile's of the same function where the setting asks for it."""
    return {"torch": eager} | ({"compile": torch.compile(eager, dynamic=False)} if setting.compile else {})


def floor(dtype: str, setting: Setting) -> float:
    """Return the floor of the error of latentrt's kernels on the setting's device."""
    return (cases.TRITON_FLOOR if setting.device == "cuda" else cases.CPP_FLOOR)[dtype]


@functools.lru_cache(maxsize=3)
def as_numpy(x: torch.Tensor) -> Any:
    """Return an array on the tensor's memory; bfloat16, which numpy lacks, as uint16.

    It is remembered: who calls the C++ kernels has arrays already.
    """
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def as_tensor(array: Any, dtype: str) -> torch.Tensor:
    """Return a tensor on the array's memory, the inverse of `as_numpy`."""
    x = torch.from_numpy(array)
    return x.view(torch.bfloat16) if dtype == "bf16" else x


@functools.cache
def _matrices(n: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two square matrices, made once a dtype; nobody writes to them."""
    return torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)


def _rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def _largest(x: torch.Tensor) -> float:
    return x.abs().max().item()
