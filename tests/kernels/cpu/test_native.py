"""The C++ kernels against float64, at every instruction set of this machine.

The error, both the largest and the RMS, may be at most twice torch's own in the same dtype on the same inputs, plus a
floor. LATENTRT_TEST_LIBRARY names another build of the library to test, as `make native-asan` does.
"""

import ctypes
import multiprocessing
import os
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from benchmarks.cases import CPP_FLOOR, most_error
from kernels.cpu import native

if library := os.environ.get("LATENTRT_TEST_LIBRARY"):
    native.LIBRARY = Path(library)
    native.isas()  # which was asked for, so its absence is an error
if reason := native.available():
    pytest.skip(reason, allow_module_level=True)

DTYPES = {"fp32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16), "fp16": np.dtype(np.float16)}
TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

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

GROUP_NORM = {
    # batch, channels, positions, groups
    "minimal": (1, 2, 1, 1),
    "one-group": (1, 7, 5, 1),
    "odd": (2, 30, 77, 6),
    "group-of-one": (1, 17, 19, 17),
    "sd15-64": (1, 320, 4096, 32),
    "sd15-8": (2, 1280, 64, 32),
    "sd15-skip": (1, 2560, 64, 32),
    "vae-512": (1, 128, 16384, 32),
}


def _normal(shape: tuple[int, ...], dtype: str, seed: int, amplitude: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * amplitude).astype(DTYPES[dtype])


def _qkv(case: tuple[int, ...], dtype: str, amplitude: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As a UNet has them: [batch, tokens, heads, head_dim], seen as [batch, heads, tokens, head_dim]."""
    batch, heads, queries, keys, head_dim = case
    shapes = ((batch, queries, heads, head_dim), (batch, keys, heads, head_dim), (batch, keys, heads, head_dim))
    q, k, v = (_normal(shape, dtype, seed, amplitude if seed == 0 else 1).transpose(0, 2, 1, 3)
               for seed, shape in enumerate(shapes))
    return q, k, v


def _poisoned(like: np.ndarray) -> np.ndarray:
    out = np.empty_like(like)
    out[...] = np.nan
    return out


def _exact(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float | None = None, causal: bool = False) -> np.ndarray:
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores[..., ~np.tril(np.ones(scores.shape[-2:], bool))] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def _torch(array: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32)).to(TORCH[dtype])


def _passes(ours: np.ndarray, exact: np.ndarray, peer: torch.Tensor, dtype: str) -> bool:
    """NaN passes nothing: no comparison with it is true."""
    error, allowed = ours.astype(np.float64) - exact, peer.double().numpy() - exact
    return all(size(error) <= most_error(size(allowed), size(exact), CPP_FLOOR[dtype]) for size in (_largest, _rms))


def _largest(x: np.ndarray) -> float:
    return float(np.abs(x).max())


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x).mean()))


def _peer(q: np.ndarray, k: np.ndarray, v: np.ndarray, dtype: str, **options: object) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(*(_torch(x, dtype) for x in (q, k, v)), **options)


@pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("isa", native.isas())
def test_attention(isa, dtype, case):
    q, k, v = _qkv(case, dtype)
    out = _poisoned(q)
    assert native.attention(q, k, v, out, threads=2, isa=isa) is out
    exact = _exact(q, k, v)
    peer = _peer(q, k, v, dtype)
    assert _passes(out, exact, peer, dtype)
    assert not _passes(out.astype(np.float64) * 1.01, exact, peer, dtype), "a wrong result would pass"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("case", [(1, 2, 77, 77, 64), (1, 1, 130, 130, 40), (1, 1, 20, 200, 40), (1, 1, 200, 20, 160)],
                         ids=["clip", "odd", "more-keys", "more-queries"])
def test_causal(isa, dtype, case):
    q, k, v = _qkv(case, dtype)
    out = native.attention(q, k, v, _poisoned(q), causal=True, isa=isa)
    exact = _exact(q, k, v, causal=True)
    peer = _peer(q, k, v, dtype, is_causal=True)
    assert _passes(out, exact, peer, dtype)
    assert not _passes(native.attention(q, k, v, isa=isa), exact, peer, dtype)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_scores_of_any_size(isa, dtype, causal):
    """Scores of hundreds, which exp overflows at, the largest in the last block of keys."""
    q, k, v = _qkv((1, 1, 150, 150, 40), dtype, amplitude=60)
    q[0, 0, 100:, :], k[0, 0, 140:, :] = np.abs(q[0, 0, 100:, :]), 3
    exact = _exact(q, k, v, causal=causal)
    out = native.attention(q, k, v, _poisoned(q), causal=causal, isa=isa)
    assert _passes(out, exact, _peer(q, k, v, dtype, is_causal=causal), dtype)


@pytest.mark.parametrize("isa", native.isas())
def test_scale(isa):
    q, k, v = _qkv((1, 1, 40, 40, 64), "bf16")
    for scale in (0.0, 0.5, -0.25):
        exact = _exact(q, k, v, scale=scale)
        out = native.attention(q, k, v, _poisoned(q), scale=scale, isa=isa)
        assert _passes(out, exact, _peer(q, k, v, "bf16", scale=scale), "bf16")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("isa", native.isas())
def test_layouts(isa, dtype):
    """Slices of a fused projection, dense heads, and bits as uint16 give one result; nothing beside out changes."""
    fused = _normal((2, 50, 3, 2, 40), dtype, 7)
    q, k, v = (fused[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
    expected = native.attention(*(np.ascontiguousarray(x) for x in (q, k, v)), isa=isa)
    padded = np.full((2, 50, 2, 56), 7, DTYPES[dtype])
    out = padded[..., 8:48].transpose(0, 2, 1, 3)
    native.attention(q, k, v, out, isa=isa)
    assert np.array_equal(out, expected)
    assert (padded[..., :8] == 7).all() and (padded[..., 48:] == 7).all()
    if dtype == "bf16":
        bits = native.attention(*(x.view(np.uint16) for x in (q, k, v)), isa=isa)
        assert bits.dtype == np.uint16 and np.array_equal(bits, expected.view(np.uint16))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("isa", native.isas())
def test_threads_do_not_change_the_result(isa, dtype):
    q, k, v = _qkv((1, 3, 161, 90, 40), dtype)
    one = native.attention(q, k, v, threads=1, isa=isa)
    for threads in (2, 3, 64):
        assert np.array_equal(native.attention(q, k, v, threads=threads, isa=isa), one)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_nan_is_not_hidden(isa, dtype, which):
    arrays = dict(zip("qkv", _qkv((1, 1, 70, 70, 40), dtype), strict=True))
    arrays[which][0, 0, 66, 5] = np.nan
    out = native.attention(**arrays, isa=isa).astype(np.float32)
    affected = {"q": out[0, 0, 66], "k": out[0, 0], "v": out[0, 0, :, 5]}[which]
    assert np.isnan(affected).all()


def test_calls_from_several_threads():
    q, k, v = _qkv((1, 2, 100, 100, 64), "bf16")
    expected = native.attention(q, k, v, threads=1)
    results: list[np.ndarray] = []
    callers = [threading.Thread(target=lambda: results.append(native.attention(q, k, v, threads=2))) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 8 and all(np.array_equal(result, expected) for result in results)


def _in_child(queue) -> None:
    q, k, v = _qkv((1, 2, 64, 64, 40), "bf16")
    queue.put(native.attention(q, k, v, threads=2).astype(np.float32))


def test_a_forked_process_has_threads_of_its_own():
    q, k, v = _qkv((1, 2, 64, 64, 40), "bf16")
    expected = native.attention(q, k, v, threads=2).astype(np.float32)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    assert np.array_equal(queue.get(timeout=60), expected)
    child.join(60)
    assert child.exitcode == 0


def _group_norm_exact(x: np.ndarray, groups: int, weight: np.ndarray, bias: np.ndarray, eps: float,
                      silu: bool) -> np.ndarray:
    grouped = x.astype(np.float64).reshape(x.shape[0], groups, -1)
    normal = (grouped - grouped.mean(-1, keepdims=True)) / np.sqrt(grouped.var(-1, keepdims=True) + eps)
    y = normal.reshape(x.shape) * weight.astype(np.float64)[:, None] + bias.astype(np.float64)[:, None]
    return y / (1 + np.exp(-y)) if silu else y


@pytest.mark.parametrize("silu", [False, True], ids=["plain", "silu"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", GROUP_NORM.values(), ids=GROUP_NORM)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", native.isas()[:2])
def test_group_norm(isa, dtype, case, channels_last, silu):
    batch, channels, positions, groups = case
    x = (_normal((batch, channels, positions), dtype, 0).astype(np.float32) * 2 + 3).astype(DTYPES[dtype])
    weight, bias = _normal((channels,), dtype, 1), _normal((channels,), dtype, 2)
    eps = 1e-6 if silu else 1e-5
    exact = _group_norm_exact(x, groups, weight, bias, eps, silu)
    stored = np.ascontiguousarray(x.transpose(0, 2, 1)) if channels_last else x
    out = native.group_norm(stored, groups, weight, bias, _poisoned(stored), eps=eps, silu=silu, threads=2,
                            channels_last=channels_last, isa=isa)
    out = out.transpose(0, 2, 1) if channels_last else out
    peer = torch.nn.functional.group_norm(*(_torch(a, dtype) if isinstance(a, np.ndarray) else a
                                            for a in (x, groups, weight, bias)), eps)
    peer = torch.nn.functional.silu(peer) if silu else peer
    assert _passes(out, exact, peer, dtype)
    assert not _passes(out.astype(np.float64) * 1.01, exact, peer, dtype), "a wrong result would pass"


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("isa", native.isas()[:2])
def test_group_norm_of_a_small_variance(isa, channels_last):
    """E[x²] − E[x]² in float32 would leave nothing of a variance of 1 beside a mean of 3000."""
    x = (np.random.default_rng(0).standard_normal((1, 8, 5000)) + 3000).astype(np.float32)
    one, zero = np.ones(8, np.float32), np.zeros(8, np.float32)
    exact = _group_norm_exact(x, 2, one, zero, 1e-5, False)
    stored = np.ascontiguousarray(x.transpose(0, 2, 1)) if channels_last else x
    out = native.group_norm(stored, 2, one, zero, channels_last=channels_last, threads=1, isa=isa)
    assert _largest((out.transpose(0, 2, 1) if channels_last else out) - exact) < 1e-3


def test_group_norm_in_place():
    x = _normal((2, 64, 9, 9), "fp32", 0)
    weight, bias = _normal((64,), "fp32", 1), _normal((64,), "fp32", 2)
    expected = native.group_norm(x, 32, weight, bias, silu=True)
    assert np.array_equal(native.group_norm(x, 32, weight, bias, x, silu=True), expected)


@pytest.mark.parametrize("isa", native.isas()[:2])
def test_silu_of_large_values(isa):
    x = np.array([[[-1e4, -300, -90, -20, 0, 20, 90, 1e4]]], np.float32)
    out = native.group_norm(x, 1, np.full(1, 1e4, np.float32), np.zeros(1, np.float32), silu=True, isa=isa)
    exact = _group_norm_exact(x, 1, np.full(1, 1e4), np.zeros(1), 1e-5, False)
    with np.errstate(over="ignore"):
        assert np.allclose(out, exact / (1 + np.exp(-exact)), rtol=1e-5, atol=1e-30)


ONE = np.zeros((1, 2, 8, 16), np.float32)


def _all(shape: tuple[int, ...], dtype: type | np.dtype = np.float32) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, dtype) for name in ("q", "k", "v", "out")}


REFUSED = {
    "dtype": ({"q": ONE.astype(np.float64)}, "q: got dtype float64"),
    "fp16": (_all((1, 2, 8, 16), np.float16), "float32 or bfloat16"),
    "byte-order": (_all((1, 2, 8, 16), np.dtype(">f4")), "q: got dtype >f4"),
    "mixed": ({"k": ONE.astype(ml_dtypes.bfloat16)}, "k: got dtype bfloat16"),
    "rank": ({"q": ONE[0]}, r"q: got shape \(2, 8, 16\)"),
    "empty": ({"k": ONE[:, :, :0], "v": ONE[:, :, :0]}, "none of them 0"),
    "heads": ({"k": ONE[:, :1], "v": ONE[:, :1]}, r"k: got shape \(1, 1, 8, 16\)"),
    "keys": ({"v": ONE[:, :, :4]}, r"v: got shape \(1, 2, 4, 16\)"),
    "out-shape": ({"out": ONE[:, :, :4].copy()}, "out: got shape"),
    "strides": ({"q": np.zeros((1, 2, 16, 8), np.float32).swapaxes(2, 3)}, "q: got strides"),
    "head-dim": (_all((1, 2, 8, 12)), "head_dim: got 12"),
    "head-dim-large": (_all((1, 1, 1, 1032)), "head_dim: got 1032"),
    "scale": ({"scale": float("nan")}, "scale: got nan"),
    "threads": ({"threads": 0}, "threads: got 0"),
    "isa": ({"isa": "sse2"}, "isa: got 'sse2'"),
}


@pytest.mark.parametrize(("wrong", "message"), REFUSED.values(), ids=REFUSED)
def test_attention_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        native.attention(**{**_all((1, 2, 8, 16)), **wrong})


def test_attention_refuses_to_overwrite():
    good = _all((1, 2, 8, 16))
    with pytest.raises(ValueError, match="out: got memory"):
        native.attention(good["q"], good["k"], good["v"], good["q"])
    good["out"].flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        native.attention(**good)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"groups": 5}, "groups: got 5 for 16 channels"),
    ({"weight": np.zeros(8, np.float32)}, r"weight: got shape \(8,\)"),
    ({"x": np.zeros((1, 16, 4), np.int32)}, "x: got dtype int32"),
    ({"x": np.zeros((1, 16, 4), ">f4")}, "x: got dtype >f4"),
    ({"bias": np.zeros(16, ">f4")}, "bias: got dtype >f4"),
    ({"x": np.zeros((1, 4, 16), np.float32).swapaxes(1, 2)}, "x: got strides"),
    ({"out": np.zeros((1, 16, 5), np.float32)}, "out: got"),
    ({"eps": -1.0}, "eps: got -1"),
], ids=["groups", "weight", "dtype", "byte-order", "byte-order-bias", "strides", "out", "eps"])
def test_group_norm_refuses(wrong, message):
    good = {"x": np.zeros((1, 16, 4), np.float32), "groups": 4, "weight": np.zeros(16, np.float32),
            "bias": np.zeros(16, np.float32)}
    with pytest.raises(ValueError, match=message):
        native.group_norm(**{**good, **wrong})


def test_the_c_interface_refuses_for_itself():
    library = native._library(native.LIBRARY)
    args = native._AttentionArgs(batch=1, heads=1, queries=1, keys=1, head_dim=12, threads=1)
    status = library.latentrt_attention(ctypes.byref(args))
    assert b"multiple of 8" in library.latentrt_status_text(status)
    assert library.latentrt_attention(None) and library.latentrt_group_norm(None)
    assert all(library.latentrt_status_text(i) for i in range(-1, 12))


def test_missing_library(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "none.so")
    assert "install CMake" in native.available()
    with pytest.raises(native.NativeError, match="expected the C\\+\\+ kernels"):
        native.attention(**_all((1, 2, 8, 16)))
    (tmp_path / "none.so").write_bytes(b"no library")
    with pytest.raises(native.NativeError, match="does not load"):
        native.isas()
