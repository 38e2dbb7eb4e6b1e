"""Our kernels or PyTorch's, site by site: what is timed, what is kept, and the C++ kernels as torch operators."""

import pytest

from kernels.cpu import library
from tests.engines.cases import rel_rms

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import kernels.cpu.torch_ops  # noqa: E402  registers the operators
import kernels.triton.attention  # noqa: E402
import kernels.triton.group_norm  # noqa: E402
from engines.inductor import choice as inductor_choice  # noqa: E402
from engines.inductor.sites import Both, Site  # noqa: E402

SITE = Site("group_norm", ((2, 8, 4, 4), (8,)), (("silu", True),))
needs_cpp = pytest.mark.skipif(bool(library.available()), reason=f"needs the C++ kernels: {library.available()}")


def theirs(x, weight, silu):
    return x * weight[:, None, None] + silu


def choose(ours, asked="auto", tolerance=1e-4):
    both = Both(ours, theirs, ((128, 1, 32, 8), (1,)), count=3)
    return inductor_choice.choose({SITE: both}, {"group_norm": asked}, torch.float32, "cpu", tolerance)


@pytest.mark.parametrize("faster", ["latentrt", "torch"])
def test_the_faster_is_kept_with_both_figures(monkeypatch, faster):
    """The figures are given here: what a clock says is no test."""
    seconds = [2e-3, 1e-3] if faster == "torch" else [1e-3, 2e-3]
    samplers = [lambda one=one: one for one in seconds]
    monkeypatch.setattr(inductor_choice, "_sampler_on_cpu", lambda call: samplers.pop(0))
    chosen, record = choose(theirs)
    assert chosen == {SITE: faster} and not record["failed"]
    row, = record["timings"]
    other = "torch" if faster == "latentrt" else "latentrt"
    assert row["used"] == faster and row["seconds"] == {faster: 1e-3, other: 2e-3}
    assert (row["kind"], row["sites"], row["arguments"]) == ("group_norm", 3, {"silu": True})
    assert all(len(rounds) == inductor_choice.ROUNDS for rounds in row["rounds"].values())


def test_equally_fast_is_pytorch_s():
    assert inductor_choice.faster({"latentrt": [1.0, 3.0, 2.0], "torch": [2.0, 2.0, 2.0]}) == "torch"


def fails(x, weight, silu):
    raise RuntimeError("out of\nshared memory")


@pytest.mark.parametrize(("ours", "why"), [
    (fails, "RuntimeError: out of shared memory"), (lambda x, weight, silu: 1.01 * theirs(x, weight, silu),
                                                    "ValueError: differs from PyTorch's by 1.0e-02"),
    (lambda x, weight, silu: theirs(x, weight, silu) * torch.nan, "ValueError: differs from PyTorch's by nan"),
], ids=["fails", "1 % off", "NaN"])
def test_ours_that_fails_or_differs_is_left_out_and_says_why(ours, why):
    chosen, record = choose(ours)
    assert chosen == {SITE: "torch"} and record["timings"] == []
    assert record["failed"]["group_norm 2x8x4x4 8"].startswith(why)


@pytest.mark.parametrize("asked", ["latentrt", "torch"])
def test_what_is_asked_for_is_not_timed(asked):
    assert choose(fails, asked) == ({SITE: asked}, {"timings": [], "failed": {}})


def test_tensors_are_timed_in_the_strides_of_the_graph():
    seen = []

    def ours(x, weight, silu):
        seen.append((x.stride(), x.dtype, weight.shape))
        return theirs(x, weight, silu)

    choose(ours)
    assert set(seen) == {((128, 1, 32, 8), torch.float32, (8,))}


def test_every_shape_of_a_kind_of_site_is_compiled():
    """There are more than torch.compile takes of one function unless it is told to forget."""
    for n in range(1, torch._dynamo.config.recompile_limit + 3):
        x = torch.ones(2, n, 4, 4)
        got = inductor_choice.compiled(theirs, backend="aot_eager")(x, torch.full((n,), 2.0), silu=True)
        assert torch.equal(got, x * 3)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("causal", [False, True], ids=["whole", "causal"])
def test_cpu_attention_is_the_operator_s(dtype, causal):
    qkv = torch.randn(2, 33, 3, 4, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, k, v = qkv.unbind(2)  # views into one projection
    got = torch.ops.latentrt.cpu_attention(q, k, v, scale=0.2, causal=causal)
    expected = kernels.triton.attention.reference(*(x.double() for x in (q, k, v)), scale=0.2, causal=causal)
    assert got.is_contiguous() and got.dtype == dtype
    assert rel_rms(got.double().numpy(), expected.numpy()) < (1e-5 if dtype == torch.float32 else 1e-2)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize("silu", [False, True], ids=["norm", "silu"])
def test_cpu_group_norm_is_the_operator_s(dtype, memory, silu):
    rng = torch.Generator().manual_seed(0)
    x = (3 + torch.randn(2, 32, 5, 7, generator=rng)).to(dtype).contiguous(memory_format=memory)
    weight, bias = (torch.randn(32, generator=rng).to(dtype) for _ in range(2))
    got = torch.ops.latentrt.cpu_group_norm(x, weight, bias, 8, 1e-5, silu)
    expected = kernels.triton.group_norm.reference(x.double(), weight.double(), bias.double(), 8, 1e-5, silu)
    assert got.stride() == x.stride() and got.dtype == dtype
    assert rel_rms(got.double().numpy(), expected.numpy()) < (1e-5 if dtype == torch.float32 else 1e-2)
