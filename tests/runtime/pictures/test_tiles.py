"""Tiled decoding and encoding against diffusers, and against the whole picture at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from models import tiny
from runtime.pictures import tiles
from tests.conftest import SHAPES

FACTOR, TILE = 4, 8
WIDE = TILE + 2 * 6  # three tiles with no remainder


@pytest.fixture(scope="module")
def vae():
    """Tiny, of three levels; diffusers' own tiles are of the same size as ours."""
    torch.manual_seed(3)
    found = tiny._vae(levels=3).eval()
    found.enable_tiling()
    found.tile_latent_min_size, found.tile_sample_min_size = TILE, TILE * FACTOR
    return found


def decoder(vae, tile: int = TILE):
    """A function of one tile, which refuses any other size as an engine would."""
    def decode(latents: np.ndarray) -> np.ndarray:
        assert latents.shape[1:] == (tile, tile)
        with torch.no_grad():
            return vae.decoder(vae.post_quant_conv(torch.from_numpy(latents[None])))[0].numpy()
    return decode


def encoder(vae):
    def encode(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert image.shape == (3, TILE * FACTOR, TILE * FACTOR)
        with torch.no_grad():
            moments = vae.quant_conv(vae.encoder(torch.from_numpy(image[None])))[0]
        mean, variance = moments.chunk(2)
        return mean.numpy(), torch.exp(0.5 * variance).numpy()
    return encode


def latents_of(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height + width).standard_normal((4, height, width)).astype(np.float32)


def smooth(height: int, width: int) -> np.ndarray:
    """A picture in [-1, 1] whose neighbours differ little."""
    y, x = np.mgrid[:height, :width] / 16
    return np.stack([np.sin(y + x), np.cos(y - x / 2), np.sin(x) * np.cos(y)]).astype(np.float32)


@pytest.mark.parametrize(("size", "tile", "expected"), [
    (8, 8, [0]), (9, 8, [0, 1]), (14, 8, [0, 6]), (20, 8, [0, 6, 12]), (21, 8, [0, 6, 12, 13]), (96, 64, [0, 32]),
    (128, 64, [0, 48, 64]), (160, 64, [0, 48, 96]),
])
def test_tiles_cover_all_and_end_at_the_edge(size, tile, expected):
    assert tiles.starts(size, tile) == expected


@pytest.mark.parametrize(("size", "tile"), [(8, 9), (8, 3)])
def test_tiles_that_cannot_be(size, tile):
    with pytest.raises(ValueError, match=rf"tile: got a side of {tile} latents, expected 4 to 8"):
        tiles.starts(size, tile)


@pytest.mark.parametrize("size", [(WIDE, WIDE), (WIDE, TILE + 6), (TILE, WIDE), (WIDE, WIDE + 3), (WIDE + 5, TILE + 1)])
def test_decoding_is_that_of_diffusers(vae, size):
    """Up to the last tile of a row and column, which diffusers has smaller."""
    latents = latents_of(*size)
    got = tiles.decode(latents, decoder(vae), (TILE, TILE), FACTOR)
    with torch.no_grad():
        expected = vae.tiled_decode(torch.from_numpy(latents[None])).sample[0].numpy()
    assert got.shape == expected.shape == (3, size[0] * FACTOR, size[1] * FACTOR)
    same = tuple(slice(same_until(side) * FACTOR) for side in size)
    np.testing.assert_allclose(got[:, *same], expected[:, *same], atol=1e-5)
    assert np.abs(got - hard(latents, vae))[:, *same].max() > 1e-2 or max(size) < TILE + 6


def same_until(side: int) -> int:
    """Latents along one side up to which our tiles, and what follows them, are those of diffusers."""
    last = tiles.starts(side, TILE)[-1]
    return last + 6 if last % 6 == 0 else last


def hard(latents: np.ndarray, vae, tile: int = TILE) -> np.ndarray:
    """The same tiles without ramps: what a test of seams has to notice."""
    ys, xs = (tiles.starts(side, tile) for side in latents.shape[1:])
    out = np.empty((3, latents.shape[1] * FACTOR, latents.shape[2] * FACTOR), np.float32)
    for y in ys:
        for x in xs:
            out[:, y * FACTOR:(y + tile) * FACTOR, x * FACTOR:(x + tile) * FACTOR] = decoder(vae, tile)(
                latents[:, y:y + tile, x:x + tile])
    return out


@pytest.mark.parametrize("size", [(WIDE, WIDE), (TILE + 6, WIDE + 4), (TILE, TILE + 2)])
def test_encoding_is_that_of_diffusers(vae, size):
    image = smooth(size[0] * FACTOR, size[1] * FACTOR)
    mean, std = tiles.encode(image, encoder(vae), (TILE, TILE), FACTOR)
    with torch.no_grad():
        expected = vae.encode(torch.from_numpy(image[None])).latent_dist
    assert mean.shape == std.shape == (4, *size)
    same = tuple(slice(same_until(side)) for side in size)
    np.testing.assert_allclose(mean[:, *same], expected.mean[0].numpy()[:, *same], atol=1e-5)
    np.testing.assert_allclose(std[:, *same], expected.std[0].numpy()[:, *same], rtol=1e-4)


def test_one_tile_is_the_whole_picture(vae):
    latents = latents_of(TILE, TILE)
    np.testing.assert_array_equal(tiles.decode(latents, decoder(vae), (TILE, TILE), FACTOR), decoder(vae)(latents))


def seams(error: np.ndarray, axis: int, tile: int) -> float:
    """How much an error [C, H, W] changes at the edges of tiles along `axis`, of how much it does elsewhere."""
    steps = np.abs(np.diff(error, axis=axis)).mean(axis=(0, 3 - axis))
    begins = tiles.starts(error.shape[axis] // FACTOR, tile)
    edges = [begin * FACTOR - 1 for begin in begins[1:]] + [(begin + tile) * FACTOR - 1 for begin in begins[:-1]]
    return float(steps[edges].max() / np.percentile(np.delete(steps, edges), 90))


@pytest.mark.parametrize("size", [(40, 40), (29, 43)], ids=["whole", "remainder"])
def test_there_are_no_seams(size):
    """What tiles change in the picture of a trained VAE changes no more across their edges than elsewhere; without
    ramps it does."""
    vae = AutoencoderKL.from_pretrained(SHAPES, subfolder="vae").eval()
    image = 0.9 * smooth(size[0] * FACTOR, size[1] * FACTOR)
    image[:, 10:40, 12:50], image[0, 30:, 30:44] = -0.5, 0.9
    with torch.no_grad():
        latents = vae.encode(torch.from_numpy(image[None])).latent_dist.mean
        whole = vae.decode(latents).sample[0].numpy()
    got = tiles.decode(latents[0].numpy(), decoder(vae, 16), (16, 16), FACTOR)
    cut = hard(latents[0].numpy(), vae, 16)
    for axis in (1, 2):
        assert seams(got - whole, axis, 16) < 1.25
        assert seams(cut - whole, axis, 16) > 5
    assert 0 < np.abs(got - whole).mean() < np.abs(cut - whole).mean()


def test_sides_that_are_no_latents_are_refused(vae):
    with pytest.raises(ValueError, match="picture: got 33x64, expected multiples of 4"):
        tiles.encode(np.zeros((3, 33, 64), np.float32), encoder(vae), (TILE, TILE), FACTOR)
