"""Attention in C++ against float64, at every instruction set of this machine."""

import multiprocessing
import threading

import ml_dtypes
import numpy as np
import pytest
import torch

from kernels.cpu import cpp, library
from tests.cases.cpu import DTYPES, normal, passes, poisoned, to_torch

if reason := library.available():
    pytest.skip(reason, allow_module_level=True)

ATTENTION = {
    # batch, heads, queries, keys, head_dim
    "minimal": (1, 1, 1, 1, 8),
    "one-tile": (1, 1, 32, 64, 40),
    "odd-queries": (1, 3, 33, 32, 40),
    "odd-keys": (2, 1, 64, 65, 64),
    "one-key": (1, 2, 50, 1, 40),
    "sd15-64-cross": (1, 2, 300, 77, 40),
    "sd15-32-self": (1, 2, 256, 256, 80),
    "sd15-32-cross": (2, 2, 100, 77, 80),
    "sd15-16-self": (1, 2, 256, 256, 160),
    "sd15-8-self": (2, 8, 64, 64, 160),
    "two-prompts": (1, 1, 70, 154, 64),
    "sd21-self": (1, 2, 576, 576, 64),
    "vae": (1, 1, 130, 200, 512),
    "head-dim-8": (1, 2, 40, 100, 8),
    "head-dim-96": (1, 1, 97, 129, 96),
    "head-dim-192": (1, 1, 270, 33, 192),
    "head-dim-200": (1, 1, 290, 95, 200),
    "head-dim-1024": (1, 1, 5, 40, 1024),
}


def qkv(case: tuple[int, ...], dtype: str, amplitude: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As a UNet has them: [batch, tokens, heads, head_dim], seen as [batch, heads, tokens, head_dim]."""
    batch, heads, queries, keys, head_dim = case
    shapes = ((batch, queries, heads, head_dim), (batch, keys, heads, head_dim), (batch, keys, heads, head_dim))
    q, k, v = (normal(shape, dtype, seed, amplitude if seed == 0 else 1).transpose(0, 2, 1, 3)
               for seed, shape in enumerate(shapes))
    return q, k, v


def exact_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float | None = None,
                    causal: bool = False) -> np.ndarray:
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores[..., ~np.tril(np.ones(scores.shape[-2:], bool))] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def torch_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, dtype: str, **options: object) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(*(to_torch(x, dtype) for x in (q, k, v)), **options)


@pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("isa", library.isas())
def test_attention(isa, dtype, case):
    q, k, v = qkv(case, dtype)
    out = poisoned(q)
    assert cpp.attention(q, k, v, out, threads=2, isa=isa) is out
    exact = exact_attention(q, k, v)
    peer = torch_attention(q, k, v, dtype)
    assert passes(out, exact, peer, dtype)
    assert not passes(out.astype(np.float64) * 1.01, exact, peer, dtype), "a wrong result would pass"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("isa", library.isas())
@pytest.mark.parametrize("case", [(1, 2, 77, 77, 64), (1, 1, 130, 130, 40), (1, 1, 20, 200, 40), (1, 1, 200, 20, 160)],
                         ids=["clip", "odd", "more-keys", "more-queries"])
def test_causal(isa, dtype, case):
    q, k, v = qkv(case, dtype)
    out = cpp.attention(q, k, v, poisoned(q), causal=True, isa=isa)
    exact = exact_attention(q, k, v, causal=True)
    peer = torch_attention(q, k, v, dtype, is_causal=True)
    assert passes(out, exact, peer, dtype)
    assert not passes(cpp.attention(q, k, v, isa=isa), exact, peer, dtype)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("isa", library.isas())
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_scores_of_any_size(isa, dtype, causal):
    """Scores of hundreds, which exp overflows at, the largest in the last block of keys."""
    q, k, v = qkv((1, 1, 150, 150, 40), dtype, amplitude=60)
    q[0, 0, 100:, :], k[0, 0, 140:, :] = np.abs(q[0, 0, 100:, :]), 3
    exact = exact_attention(q, k, v, causal=causal)
    out = cpp.attention(q, k, v, poisoned(q), causal=causal, isa=isa)
    assert passes(out, exact, torch_attention(q, k, v, dtype, is_causal=causal), dtype)


@pytest.mark.parametrize("isa", library.isas())
def test_scale(isa):
    q, k, v = qkv((1, 1, 40, 40, 64), "bf16")
    for scale in (0.0, 0.5, -0.25):
        exact = exact_attention(q, k, v, scale=scale)
        out = cpp.attention(q, k, v, poisoned(q), scale=scale, isa=isa)
        assert passes(out, exact, torch_attention(q, k, v, "bf16", scale=scale), "bf16")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("isa", library.isas())
def test_layouts(isa, dtype):
    """Slices of a fused projection, dense heads, and bits as uint16 give one result; nothing beside out changes."""
    fused = normal((2, 50, 3, 2, 40), dtype, 7)
    q, k, v = (fused[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
    expected = cpp.attention(*(np.ascontiguousarray(x) for x in (q, k, v)), isa=isa)
    padded = np.full((2, 50, 2, 56), 7, DTYPES[dtype])
    out = padded[..., 8:48].transpose(0, 2, 1, 3)
    cpp.attention(q, k, v, out, isa=isa)
    assert np.array_equal(out, expected)
    assert (padded[..., :8] == 7).all() and (padded[..., 48:] == 7).all()
    if dtype == "bf16":
        bits = cpp.attention(*(x.view(np.uint16) for x in (q, k, v)), isa=isa)
        assert bits.dtype == np.uint16 and np.array_equal(bits, expected.view(np.uint16))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("isa", library.isas())
def test_threads_do_not_change_the_result(isa, dtype):
    q, k, v = qkv((1, 3, 161, 90, 40), dtype)
    one = cpp.attention(q, k, v, threads=1, isa=isa)
    for threads in (2, 3, 64):
        assert np.array_equal(cpp.attention(q, k, v, threads=threads, isa=isa), one)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("isa", library.isas())
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_nan_is_not_hidden(isa, dtype, which):
    arrays = dict(zip("qkv", qkv((1, 1, 70, 70, 40), dtype), strict=True))
    arrays[which][0, 0, 66, 5] = np.nan
    out = cpp.attention(**arrays, isa=isa).astype(np.float32)
    affected = {"q": out[0, 0, 66], "k": out[0, 0], "v": out[0, 0, :, 5]}[which]
    assert np.isnan(affected).all()


def test_calls_from_several_threads():
    q, k, v = qkv((1, 2, 100, 100, 64), "bf16")
    expected = cpp.attention(q, k, v, threads=1)
    results: list[np.ndarray] = []
    callers = [threading.Thread(target=lambda: results.append(cpp.attention(q, k, v, threads=2))) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 8 and all(np.array_equal(result, expected) for result in results)


def in_child(queue) -> None:
    q, k, v = qkv((1, 2, 64, 64, 40), "bf16")
    queue.put(cpp.attention(q, k, v, threads=2).astype(np.float32))


def test_a_forked_process_has_threads_of_its_own():
    q, k, v = qkv((1, 2, 64, 64, 40), "bf16")
    expected = cpp.attention(q, k, v, threads=2).astype(np.float32)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=in_child, args=(queue,))
    child.start()
    assert np.array_equal(queue.get(timeout=60), expected)
    child.join(60)
    assert child.exitcode == 0


ONE = np.zeros((1, 2, 8, 16), np.float32)


def arrays_of(shape: tuple[int, ...], dtype: type | np.dtype = np.float32) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, dtype) for name in ("q", "k", "v", "out")}


REFUSED = {
    "dtype": ({"q": ONE.astype(np.float64)}, "q: got dtype float64"),
    "fp16": (arrays_of((1, 2, 8, 16), np.float16), "float32 or bfloat16"),
    "byte-order": (arrays_of((1, 2, 8, 16), np.dtype(">f4")), "q: got dtype >f4"),
    "mixed": ({"k": ONE.astype(ml_dtypes.bfloat16)}, "k: got dtype bfloat16"),
    "rank": ({"q": ONE[0]}, r"q: got shape \(2, 8, 16\)"),
    "empty": ({"k": ONE[:, :, :0], "v": ONE[:, :, :0]}, "none of them 0"),
    "heads": ({"k": ONE[:, :1], "v": ONE[:, :1]}, r"k: got shape \(1, 1, 8, 16\)"),
    "keys": ({"v": ONE[:, :, :4]}, r"v: got shape \(1, 2, 4, 16\)"),
    "out-shape": ({"out": ONE[:, :, :4].copy()}, "out: got shape"),
    "strides": ({"q": np.zeros((1, 2, 16, 8), np.float32).swapaxes(2, 3)}, "q: got strides"),
    "head-dim": (arrays_of((1, 2, 8, 12)), "head_dim: got 12"),
    "head-dim-large": (arrays_of((1, 1, 1, 1032)), "head_dim: got 1032"),
    "scale": ({"scale": float("nan")}, "scale: got nan"),
    "threads": ({"threads": 0}, "threads: got 0"),
    "isa": ({"isa": "sse2"}, "isa: got 'sse2'"),
}


@pytest.mark.parametrize(("wrong", "message"), REFUSED.values(), ids=REFUSED)
def test_attention_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        cpp.attention(**{**arrays_of((1, 2, 8, 16)), **wrong})


def test_attention_refuses_to_overwrite():
    good = arrays_of((1, 2, 8, 16))
    with pytest.raises(ValueError, match="out: got memory"):
        cpp.attention(good["q"], good["k"], good["v"], good["q"])
    good["out"].flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        cpp.attention(**good)
