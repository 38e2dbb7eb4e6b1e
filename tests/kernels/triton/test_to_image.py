"""to_image: byte for byte what its numpy twin gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.host import ops
from kernels.triton import to_image as op
from tests.cases.triton import DEVICE, DTYPES

LAYOUTS = {"channels_first": torch.contiguous_format, "channels_last": torch.channels_last}
POISON = 0xA5


def numpy_bytes(x: torch.Tensor) -> np.ndarray:
    """The picture that a CPU makes of the same values in float32."""
    out = np.empty((x.shape[0], *x.shape[2:], 3), np.uint8)
    ops.to_image(x.float().cpu().numpy(), out)
    return out


def random_image(*shape: int, dtype: str = "fp32", layout: str = "channels_first") -> torch.Tensor:
    """A decoder's output, a good part of it out of range."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])
    return x.contiguous(memory_format=LAYOUTS[layout]).to(DEVICE)


def poisoned(*shape: int, **_: object) -> torch.Tensor:
    return torch.full(*shape, POISON, dtype=torch.uint8, device=DEVICE)


@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (2, 3, 12, 10), (3, 3, 24, 40)], ids=["minimal", "odd", "blocks"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_those_of_numpy(dtype: str, layout: str, shape: tuple[int, ...],
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    x = random_image(*shape, dtype=dtype, layout=layout)
    monkeypatch.setattr(torch, "empty", poisoned)
    got = op.launch(x).cpu()
    assert got.shape == (shape[0], *shape[2:], 3)
    np.testing.assert_array_equal(got.numpy(), numpy_bytes(x))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [512, 768, 1024])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_of_real_pictures_are_those_of_numpy(dtype: str, layout: str, size: int) -> None:
    x = random_image(2, 3, size, size, dtype=dtype, layout=layout)
    np.testing.assert_array_equal(torch.ops.latentrt.to_image(x).cpu().numpy(), numpy_bytes(x))


def every(dtype: str) -> torch.Tensor:
    """Every number of a 16-bit dtype; of fp32 what lies around each of the 255 steps from one byte to the next."""
    if dtype != "fp32":
        bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
        numbers = bits.view(DTYPES[dtype])
        return torch.where(numbers.isnan(), 0, numbers)
    steps = (np.arange(255) + 0.5) / 255 * 2 - 1
    near = steps[:, None] + np.arange(-16, 17) * 2.0**-26
    return torch.from_numpy(near.ravel().astype(np.float32))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_and_every_half_rounds_as_numpy_does(dtype: str, layout: str) -> None:
    numbers = every(dtype)
    pixels = -(-len(numbers) // 12) * 4
    x = torch.zeros(3 * pixels, dtype=DTYPES[dtype])
    x[:len(numbers)] = numbers
    x = x.reshape(1, 3, pixels // 4, 4).contiguous(memory_format=LAYOUTS[layout]).to(DEVICE)
    got = op.launch(x).cpu().numpy()
    assert set(np.unique(got)) == set(range(256))
    np.testing.assert_array_equal(got, numpy_bytes(x))


def test_halves_go_to_the_even_byte() -> None:
    """x = 0 is 127.5, which is 128, and 255 · (x / 2 + 1/2) = 0.5 exactly is 0."""
    x = torch.tensor([0.0, 2 * (0.5 / 255) - 1, 1.0, -1.0]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2).contiguous()
    assert op.launch(x.to(DEVICE))[0, :, :, 0].flatten().tolist() == [128, 0, 255, 0]


def test_what_is_no_number_is_black() -> None:
    x = torch.full((1, 3, 2, 2), torch.nan, device=DEVICE)
    assert not op.launch(x).any()
    assert not op.reference(x.cpu()).any()


def test_a_kernel_that_is_one_percent_off_is_noticed() -> None:
    x = random_image(1, 3, 8, 8)
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(op.launch(x * 1.01).cpu().numpy(), numpy_bytes(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operator_on_a_cpu_is_numpy_too(dtype: str, layout: str) -> None:
    x = random_image(2, 3, 12, 10, dtype=dtype, layout=layout).cpu()
    np.testing.assert_array_equal(torch.ops.latentrt.to_image(x).numpy(), numpy_bytes(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    torch.library.opcheck(torch.ops.latentrt.to_image.default, (random_image(2, 3, 12, 10, layout=layout),))


WRONG = {
    "float64": (lambda: random_image(1, 3, 4, 4).double(), TypeError, "x: got torch.float64, expected one of"),
    "four channels": (lambda: random_image(1, 4, 4, 4), ValueError, r"got shape \(1, 4, 4, 4\), expected \[images, 3"),
    "no batch": (lambda: random_image(3, 4, 4), ValueError, "expected .images, 3, height, width."),
    "no image": (lambda: random_image(0, 3, 4, 4), ValueError, "got shape"),
    "a cut-out": (lambda: random_image(1, 3, 8, 8)[..., 2:6], ValueError, r"with strides .* call .contiguous\(\)"),
    "odd pixels": (lambda: random_image(1, 3, 3, 5), ValueError, "got 3x5 pixels, expected a multiple of four"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_the_kernel_cannot_take_is_refused(case: str) -> None:
    make, error, message = WRONG[case]
    for run in (op.launch, torch.ops.latentrt.to_image):
        with pytest.raises(error, match=message):
            run(make())


def test_every_variant_is_what_the_launcher_would_launch() -> None:
    found = {v.name: v for v in op.variants()}
    assert set(found) == {f"to_image_{dtype}_{layout}" for dtype in DTYPES for layout in ("planes", "interleaved")}
    for name, variant in found.items():
        shape = op.config(channels_last=name.endswith("interleaved"))
        assert (variant.constants, variant.num_warps) == ({"BLOCK": shape.block}, shape.num_warps)
