"""What `python -m benchmarks kernels` times: for one shape of one op our kernel, its peers and the physical limits.

Peers get the layout that a model gives them, [batch, tokens, heads, head dim] seen heads first for attention, and
everyone allocates the output. The limits are a copy of as many bytes as the op has to move, and for attention a large
matrix product in the same dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import cases
from benchmarks.harness import measure
from kernels.cpu import cpp
from kernels.host import step_table
from kernels.triton import attention, geglu, group_norm, guidance_step, layer_norm, to_image
from tests.tools.kernel_cases import DTYPES
from tests.tools.kernel_cases import FLOOR as GPU_FLOOR

Run = Callable[..., Any]


@dataclass(frozen=True)
class Setting:
    """What all shapes of one run share: threads and instruction sets count on a CPU only."""

    device: str
    compile: bool
    channels_last: bool
    threads: int
    isas: tuple[str, ...]


@dataclass(frozen=True)
class Contender:
    """`run(*inputs)` gives the result, or a tuple that begins with it. It may write to its inputs."""

    run: Run
    inputs: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Bench:
    """One op at one shape.

    ours, peers: by name; the first peer is torch's own op, which sets the tolerance. moved: bytes that must be read and
    written; flops: of matrix products. truth: the result in float64 (bytes for pictures), given `inputs`.
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

    def limits(self) -> dict[str, Contender]:
        """Copy and matrix product, by name. They are timed like everyone else."""
        device, dtype = self.inputs[0].device, DTYPES[self.dtype]
        source = torch.ones(self.moved // 2, dtype=torch.uint8, device=device)
        found = {"copy": Contender(lambda source, out: out.copy_(source), (source, torch.empty_like(source)))}
        if self.flops:
            found["matmul"] = Contender(torch.matmul, _matrices(measure.MATRIX_SIDE[device.type], dtype, device))
        return found

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
            limit = 2 * theirs + self.floor * norm(truth)
            assert ours <= limit, f"{name} error {ours:.3g}, expected at most {limit:.3g} (torch's is {theirs:.3g})"


@dataclass(frozen=True)
class Latents:
    """guidance_step on `images` latents of 4 channels, with guidance and a memory of 3 arrays."""

    model: str
    images: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.model}-{self.images}x4x{self.height}x{self.width}"


@dataclass(frozen=True)
class Pictures:
    """to_image on `images` pictures."""

    model: str
    images: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.model}-{self.images}x3x{self.height}x{self.width}"


SIZES = (("sd15", 64), ("sd21", 96), ("sdxl", 128))
CASES: dict[str, tuple[Any, ...]] = {
    "attention": cases.ATTENTION, "group_norm": cases.GROUP_NORM, "layer_norm": cases.LAYER_NORM, "geglu": cases.GEGLU,
    "guidance_step": tuple(Latents(model, images, n, n) for model, n in SIZES for images in (1, 4)),
    "to_image": tuple(Pictures(model, images, 8 * n, 8 * n) for model, n in SIZES for images in (1, 4)),
}
ON_CPU = ("attention", "group_norm")
"""Ops that have a kernel of ours for CPUs."""


def make(op: str, case: Any, dtype: str, setting: Setting) -> Bench:
    """The contenders for one shape; `torch.compile` starts afresh, so that it compiles for this shape alone."""
    torch.compiler.reset()
    return MAKERS[op](case, dtype, setting)


@functools.cache
def _matrices(n: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Made once a dtype; nobody writes to them."""
    return torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)


def _attention(case: cases.Attention, dtype: str, setting: Setting) -> Bench:
    shapes = [(case.batch, n, case.heads, case.head_dim) for n in (case.n_q, case.n_k, case.n_k)]
    q, k, v = (_random(*shape, dtype=dtype, setting=setting, seed=i) for i, shape in enumerate(shapes))

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal).transpose(1, 2)

    def ours_on_cpu(isa: str) -> Run:
        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            heads_first = (_numpy(t).transpose(0, 2, 1, 3) for t in (q, k, v))
            out = cpp.attention(*heads_first, causal=case.causal, threads=setting.threads, isa=isa)
            return _tensor(out, dtype).transpose(1, 2)
        return run

    def truth(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = q.double(), k.double(), v.double()
        parts = (q,) if case.causal else q.split(1024, 1)  # the scores of all queries at once would take gigabytes
        return torch.cat([attention.reference(part, k, v, causal=case.causal) for part in parts], 1)

    if setting.device == "cuda":
        ours: dict[str, Run] = {"latentrt": functools.partial(torch.ops.latentrt.attention, causal=case.causal)}
        peers = {"torch": sdpa, **{name: _with_backend(sdpa, backend) for name, backend in SDPA_BACKENDS.items()}}
        if setting.compile and not case.causal:
            peers["compile"] = _flex()
    else:
        ours = {f"latentrt-{isa}": ours_on_cpu(isa) for isa in setting.isas}
        peers = {"torch": sdpa} | ({"compile": torch.compile(sdpa, dynamic=False)} if setting.compile else {})
    moved = 2 * (q.numel() + k.numel()) * q.element_size()
    return Bench("attention", str(case), dtype, (q, k, v), ours, peers, truth, moved, case.flops,
                 _floor(dtype, setting))


SDPA_BACKENDS = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION",
                 "math": "MATH"}


def _with_backend(sdpa: Run, name: str) -> Run:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(getattr(SDPBackend, name)):
            return sdpa(*inputs)
    return run


def _flex() -> Run:
    """torch.compile's own attention kernel; compiling scaled_dot_product_attention calls the eager one."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _group_norm(case: cases.GroupNorm, dtype: str, setting: Setting) -> Bench:
    shape = (case.images, case.channels, case.height, case.width)
    x = _random(*shape, dtype=dtype, setting=setting, channels_last=setting.channels_last)
    weight, bias = (_random(case.channels, dtype=dtype, setting=setting, seed=seed) for seed in (1, 2))

    def eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        y = F.group_norm(x, case.groups, weight, bias, case.eps)
        return F.silu(y) if case.silu else y

    def ours_on_gpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.ops.latentrt.group_norm(x, weight, bias, case.groups, case.eps, case.silu)

    def ours_on_cpu(isa: str) -> Run:
        wide = [t.float().numpy() for t in (weight, bias)]  # as an engine keeps them

        def run(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            array = _numpy(x)
            out = cpp.group_norm(np.moveaxis(array, 1, -1) if setting.channels_last else array, case.groups, *wide,
                                    eps=case.eps, silu=case.silu, channels_last=setting.channels_last,
                                    threads=setting.threads, isa=isa)
            return _tensor(out, dtype).movedim(-1, 1) if setting.channels_last else _tensor(out, dtype)
        return run

    def truth(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        size = case.channels // case.groups * max(1, case.groups // 8)  # an eighth of the groups at a time
        parts = zip(x.split(size, 1), weight.double().split(size), bias.double().split(size), strict=True)
        return torch.cat([group_norm.reference(part.double(), w, b, w.numel() * case.groups // case.channels, case.eps,
                                               case.silu) for part, w, b in parts], 1)

    on_gpu = setting.device == "cuda"
    ours = {"latentrt": ours_on_gpu} if on_gpu else {f"latentrt-{isa}": ours_on_cpu(isa) for isa in setting.isas}
    return Bench("group_norm", str(case), dtype, (x, weight, bias), ours, _peers(eager, setting), truth,
                 2 * x.numel() * x.element_size(), 0, _floor(dtype, setting))


def _layer_norm(case: cases.LayerNorm, dtype: str, setting: Setting) -> Bench:
    x = _random(case.rows, case.n, dtype=dtype, setting=setting)
    weight, bias = (_random(case.n, dtype=dtype, setting=setting, seed=seed) for seed in (1, 2))
    return Bench("layer_norm", str(case), dtype, (x, weight, bias),
                 {"latentrt": lambda x, weight, bias: torch.ops.latentrt.layer_norm(x, weight, bias, 1e-5)},
                 _peers(lambda x, weight, bias: F.layer_norm(x, (case.n,), weight, bias, 1e-5), setting),
                 lambda x, weight, bias: layer_norm.reference(x.double(), weight.double(), bias.double(), 1e-5),
                 2 * x.numel() * x.element_size(), 0, _floor(dtype, setting))


def _geglu(case: cases.Geglu, dtype: str, setting: Setting) -> Bench:
    x = _random(case.rows, 2 * case.n, dtype=dtype, setting=setting)

    def eager(x: torch.Tensor) -> torch.Tensor:
        value, gate = x.chunk(2, -1)
        return value * F.gelu(gate)

    return Bench("geglu", str(case), dtype, (x,), {"latentrt": torch.ops.latentrt.geglu}, _peers(eager, setting),
                 lambda x: geglu.reference(x.double()), 3 * case.rows * case.n * x.element_size(), 0,
                 _floor(dtype, setting))


def _guidance_step(case: Latents, dtype: str, setting: Setting) -> Bench:
    """Guided and rescaled, with noise and a memory of three arrays; the table is as long as the timing can need."""
    latent, images, memory, rows = (4, case.height, case.width), case.images, 3, 4096
    random = functools.partial(_random, setting=setting)
    table = random(images, 1, step_table.width(memory), dtype="fp32", seed=1).repeat(1, rows, 1)
    table[:, :, step_table.MIX:] *= 0.2  # repeated steps shrink what they are given
    table[:, :, step_table.DRAW] = torch.arange(rows)
    noise_pred = random(2 * images, *latent, dtype=dtype)
    inputs = (noise_pred, random(images, 1, *latent, dtype="fp32", seed=2), table,
              torch.tensor([[7.5, 0.7, 0.0]] * images, device=setting.device),
              torch.zeros(images, 3, *latent, device=setting.device),
              random(images, 1 + memory, *latent, dtype="fp32", seed=3), torch.empty_like(noise_pred),
              torch.zeros(2 * images, device=setting.device),
              torch.tensor([[0, rows, 0]] * images, dtype=torch.int32, device=setting.device))

    def ours(*inputs: torch.Tensor) -> torch.Tensor:
        torch.ops.latentrt.guidance_step(*inputs)
        return inputs[5]

    def truth(*inputs: torch.Tensor) -> torch.Tensor:
        wide = [t.double() if t.is_floating_point() else t for t in inputs]
        guidance_step.reference(*wide)
        return wide[5]

    n = noise_pred[0].numel() * images
    moved = 4 * n * noise_pred.element_size() + (2 * (1 + memory) + 1) * n * 4
    return Bench("guidance_step", str(case), dtype, inputs, {"latentrt": ours}, _peers(_eager_step, setting), truth,
                 moved, 0, GPU_FLOOR["fp32"])


def _eager_step(noise_pred: torch.Tensor, noise: torch.Tensor, table: torch.Tensor, controls: torch.Tensor,
                known: torch.Tensor, state: torch.Tensor, sample: torch.Tensor, timestep: torch.Tensor,
                progress: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The formula of guidance_step on whole batches, without inpainting, at the row of the table that is next."""
    each = (-1, 1, 1, 1)
    images, states = state.shape[:2]
    batch, i = torch.arange(images, device=state.device), progress[:, 0].long()
    row, following = table[batch, i], table[batch, i + 1]
    uncond, cond = noise_pred.float().chunk(2)
    guided = uncond + controls[:, 0].view(each) * (cond - uncond)
    share = controls[:, 1].view(each)
    m = guided * (share * cond.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True) + 1 - share)
    x = state[:, 0]
    p = row[:, step_table.PREDICT_X].view(each) * x + row[:, step_table.PREDICT_M].view(each) * m
    clip = row[:, step_table.CLIP].view(each)
    p = torch.where(clip > 0, torch.minimum(torch.maximum(p, -clip), clip), p)
    mix = row[:, step_table.MIX:].reshape(images, states, states + 3)
    terms = torch.cat([torch.stack([x, p], 1), state[:, 1:], noise[:, :1], m[:, None]], 1)
    new = torch.bmm(mix, terms.flatten(2)).view_as(state)
    scaled = (new[:, 0] * following[:, step_table.INPUT_SCALE].view(each)).to(sample.dtype)
    return new, torch.cat([scaled, scaled]), following[:, step_table.TIMESTEP].repeat(2)


def _to_image(case: Pictures, dtype: str, setting: Setting) -> Bench:
    x = _random(case.images, 3, case.height, case.width, dtype=dtype, setting=setting,
                channels_last=setting.channels_last)

    def eager(x: torch.Tensor) -> torch.Tensor:
        unit = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float()
        return (unit * 255).round().to(torch.uint8).contiguous()

    return Bench("to_image", str(case), dtype, (x,), {"latentrt": torch.ops.latentrt.to_image}, _peers(eager, setting),
                 to_image.reference, x.numel() * (x.element_size() + 1), 0, 0.0)


MAKERS: dict[str, Callable[[Any, str, Setting], Bench]] = {
    "attention": _attention, "group_norm": _group_norm, "layer_norm": _layer_norm, "geglu": _geglu,
    "guidance_step": _guidance_step, "to_image": _to_image}


def _peers(eager: Run, setting: Setting) -> dict[str, Run]:
    return {"torch": eager} | ({"compile": torch.compile(eager, dynamic=False)} if setting.compile else {})


def _floor(dtype: str, setting: Setting) -> float:
    if setting.device == "cuda":
        return GPU_FLOOR[dtype]
    from tests.tools.cpu_cases import FLOOR

    return FLOOR[dtype]


def _random(*shape: int, dtype: str, setting: Setting, seed: int = 0, channels_last: bool = False) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DTYPES[dtype]).to(setting.device)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


@functools.lru_cache(maxsize=3)
def _numpy(x: torch.Tensor) -> Any:
    """The same memory; bfloat16, which numpy lacks, as uint16. Remembered: who calls our kernels has arrays already."""
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def _tensor(array: Any, dtype: str) -> torch.Tensor:
    x = torch.from_numpy(array)
    return x.view(torch.bfloat16) if dtype == "bf16" else x


def _rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def _largest(x: torch.Tensor) -> float:
    return x.abs().max().item()


def chosen(op: str, text: Iterable[str]) -> list[Any]:
    """The shapes of an op whose name contains one of these texts; all of them without any."""
    wanted = list(text)
    return [case for case in CASES[op] if not wanted or any(part in str(case) for part in wanted)]
