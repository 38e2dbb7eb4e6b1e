"""Networks of other image models in plain torch, small, with random weights, which tracing and engines must take.

A DDPM of 1x28x28 pictures with layer norms, one of 3x64x64 with group norms and attention (arXiv 2006.11239), a VQ-VAE
(arXiv 1711.00937), the gated PixelCNN that draws its codes (arXiv 1606.05328), and a VQGAN with the GPT that draws its
codes after those of a condition (arXiv 2012.09841).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class LayerNormBlock(nn.Module):
    """A block of layer norm over channels and pixels, two convolutions, and the input added."""

    def __init__(self, into: int, out: int, size: int) -> None:
        super().__init__()
        self.norm, self.first = nn.LayerNorm((into, size, size)), nn.Conv2d(into, out, 3, padding=1)
        self.second = nn.Conv2d(out, out, 3, padding=1)
        self.residual = nn.Conv2d(into, out, 1) if into != out else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.second(F.relu(self.first(self.norm(x)))) + self.residual(x))


class DigitsUNet(nn.Module):
    """A UNet: noisy pictures [n, 1, 28, 28] and timesteps int64 [n] → noise. Levels have 28, 14, 7 and 3 pixels.

    A level of odd size is padded. The time is a table of sines and cosines in turn; the input of each level is what
    was skipped, then what comes up.
    """

    def __init__(self, channels: Sequence[int] = (10, 20, 40, 80), width: int = 128, steps: int = 1000) -> None:
        super().__init__()
        sizes = [28 // 2**n for n in range(len(channels))]
        angle = torch.arange(steps)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
        self.register_buffer("table", torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1))
        into = [1, *channels[:-2]]
        self.down_times = nn.ModuleList(nn.Sequential(nn.Linear(width, n), nn.ReLU(), nn.Linear(n, n)) for n in into)
        self.encoders = nn.ModuleList(_pair(*both) for both in zip(into, channels[:-1], sizes, strict=False))
        self.downs = nn.ModuleList(nn.Conv2d(n, n, 2, stride=2) for n in channels[:-1])
        self.mid_time, self.mid = nn.Linear(width, channels[-2]), _pair(channels[-2], channels[-1], sizes[-1])
        self.ups = nn.ModuleList(nn.ConvTranspose2d(2 * n, n, 2, stride=2) for n in channels[:-1])
        self.up_times = nn.ModuleList(nn.Linear(width, 2 * n) for n in channels[:-1])
        self.decoders = nn.ModuleList(_pair(2 * n, n, size) for n, size in zip(channels, sizes[:-1], strict=False))
        self.out = nn.Conv2d(channels[0], 1, 3, padding=1)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        time, skips = F.embedding(timestep, self.table), []
        for told, encoder, down in zip(self.down_times, self.encoders, self.downs, strict=True):
            skips.append(encoder(x + told(time)[:, :, None, None]))
            x = down(skips[-1])
        x = self.mid(x + self.mid_time(time)[:, :, None, None])
        for level in reversed(range(len(skips))):
            x = self.ups[level](x)
            rows, columns = (skips[level].shape[d] - x.shape[d] for d in (2, 3))
            x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
            x = torch.cat([skips[level], x], dim=1)
            x = self.decoders[level](x + self.up_times[level](time)[:, :, None, None])
        return self.out(x)


def _pair(into: int, out: int, size: int) -> nn.Sequential:
    return nn.Sequential(LayerNormBlock(into, out, size), LayerNormBlock(out, out, size))


class Residual(nn.Module):
    """A block of group norm, SiLU and a convolution, twice, with the embedded time (if any) between."""

    def __init__(self, into: int, out: int, time: int = 0) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, into), nn.Conv2d(into, out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(32, out), nn.Conv2d(out, out, 3, padding=1)
        self.time = nn.Linear(time, out) if time else None
        self.skip = nn.Conv2d(into, out, 1) if into != out else nn.Identity()

    def forward(self, x: torch.Tensor, time: torch.Tensor | None = None) -> torch.Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        if self.time is not None and time is not None:
            y = y + self.time(F.silu(time))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(y)))


class Attention(nn.Module):
    """Attention of one head over all pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(32, channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor, time: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = (part.flatten(2).transpose(1, 2)[:, None] for part in self.qkv(self.norm(x)).chunk(3, dim=1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape))


class FacesUNet(nn.Module):
    """A UNet: noisy pictures [n, 3, 64, 64] and timesteps int64 [n] → noise; it attends at the last two levels."""

    def __init__(self, channels: Sequence[int] = (32, 64, 64, 64), residuals: int = 2) -> None:
        super().__init__()
        time, first = 4 * channels[0], channels[0]
        self.first = first
        self.time = nn.Sequential(nn.Linear(first, time), nn.SiLU(), nn.Linear(time, time))
        self.conv_in, widths = nn.Conv2d(3, first, 3, padding=1), [first]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, out in enumerate(channels):
            for _ in range(residuals):
                self.down.append(self._block(widths[-1], out, time, level >= 2))
                widths.append(out)
            if level < len(channels) - 1:
                self.down.append(nn.ModuleList([nn.Conv2d(out, out, 3, stride=2, padding=1)]))
                widths.append(out)
        self.mid, x = self._block(out, out, time, True), out
        for level, out in reversed(list(enumerate(channels))):
            for _ in range(residuals + 1):
                self.up.append(self._block(x + widths.pop(), out, time, level >= 2))
                x = out
            if level:
                self.up.append(nn.ModuleList([nn.Upsample(scale_factor=2), nn.Conv2d(out, out, 3, padding=1)]))
        self.out = nn.Sequential(nn.GroupNorm(32, first), nn.SiLU(), nn.Conv2d(first, 3, 3, padding=1))

    @staticmethod
    def _block(into: int, out: int, time: int, attends: bool) -> nn.ModuleList:
        return nn.ModuleList([Residual(into, out, time), *([Attention(out)] if attends else [])])

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        half = self.first // 2
        angle = timestep[:, None].float() * torch.exp(torch.arange(half) * -(9.21034037 / (half - 1)))
        time = self.time(torch.cat([angle.sin(), angle.cos()], dim=1))
        x = self.conv_in(x)
        skips = [x]
        for block in self.down:
            skips.append(x := self._run(block, x, time))
        x = self._run(self.mid, x, time)
        for block in self.up:
            joins = isinstance(block[0], Residual)
            x = self._run(block, torch.cat([x, skips.pop()], dim=1) if joins else x, time)
        return self.out(x)

    @staticmethod
    def _run(block: nn.ModuleList, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        for layer in block:
            x = layer(x, time) if isinstance(layer, Residual | Attention) else layer(x)
        return x


def nearest(z: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """Return for each vector of z [n, C, h, w] the nearest of the book [K, C] (z² + e² − 2 z e): int64 [n, h, w]."""
    flat = z.permute(0, 2, 3, 1)
    return (flat.square().sum(-1, keepdim=True) + book.square().sum(-1) - 2 * flat @ book.t()).argmin(-1)


class VQVAE(nn.Module):
    """An autoencoder: pictures [n, 1, H, W] in [0, 1] → codes int64 [n, H/4, W/4] and pictures made of them."""

    def __init__(self, dim: int = 32, codes: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, dim, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 4, stride=2, padding=1),
            nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1), VQResidual(dim), VQResidual(dim))
        self.book = nn.Embedding(codes, dim)
        self.decoder = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1), VQResidual(dim), VQResidual(dim),
            nn.ConvTranspose2d(dim, dim, 4, stride=2, padding=1), nn.ReLU(),
            nn.ConvTranspose2d(dim, 1, 4, stride=2, padding=1))
        nn.init.uniform_(self.book.weight, -1 / codes, 1 / codes)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = nearest(self.encoder(image), self.book.weight)
        return codes, self.decoder(self.book(codes).permute(0, 3, 1, 2))


class VQResidual(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


class GatedBlock(nn.Module):
    """A block of two stacks: all rows above, and what is to the left in this row; each ends in tanh times sigmoid.

    first: whether it does not see the pixel itself.
    """

    def __init__(self, into: int, width: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.vertical, self.horizontal = (nn.Conv2d(into, 2 * width, 3, padding=1) for _ in range(2))
        self.between, self.out = nn.Conv2d(2 * width, 2 * width, 1), nn.Conv2d(width, width, 1)
        with torch.no_grad():
            self.vertical.weight[:, :, 2:] = 0
            self.horizontal.weight[:, :, [0, 2]] = 0
            self.horizontal.weight[:, :, 1, 1 if first else 2:] = 0

    def forward(self, above: torch.Tensor, left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.vertical(above)
        row = self.horizontal(left) + self.between(F.pad(rows[:, :, :-1], (0, 0, 1, 0)))
        above, gated = (a.tanh() * b.sigmoid() for a, b in (rows.chunk(2, dim=1), row.chunk(2, dim=1)))
        gated = self.out(gated)
        return above, gated if self.first else gated + left


class PixelCNN(nn.Module):
    """A model of codes: int64 [n, h, w] → logits [n, K, h, w] of each, given those before it in raster order."""

    def __init__(self, codes: int = 32, width: int = 16, linear: int = 32, blocks: int = 15) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, width)
        self.blocks = nn.ModuleList(GatedBlock(width, width, n == 0) for n in range(blocks))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(width, linear, 1), nn.ReLU(), nn.Conv2d(linear, codes, 1))

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        above = left = self.embedding(codes).permute(0, 3, 1, 2)
        for block in self.blocks:
            above, left = block(above, left)
        return self.head(left)


class VQGAN(nn.Module):
    """An autoencoder: pictures [n, 3, H, W] in [-1, 1] → codes int64 [n, H/16, W/16] and pictures made of them."""

    def __init__(self, width: int = 32, levels: int = 5, codes: int = 64) -> None:
        super().__init__()
        down, up = [], []
        for _ in range(levels - 1):
            down += [Residual(width, width), nn.Conv2d(width, width, 3, stride=2, padding=1)]
            up += [Residual(width, width), nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)]
        middle = [[Residual(width, width), Attention(width), Residual(width, width)] for _ in range(2)]
        self.encoder = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *down, *middle[0], *self._last(width, width))
        self.quant, self.book, self.post = nn.Conv2d(width, width, 1), nn.Embedding(codes, width), nn.Conv2d(
            width, width, 1)
        self.decoder = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), *middle[1], *up, *self._last(width, 3))

    @staticmethod
    def _last(width: int, out: int) -> list[nn.Module]:
        return [nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1)]

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = nearest(self.quant(self.encoder(image)), self.book.weight)
        return codes, self.decoder(self.post(self.book(codes).permute(0, 3, 1, 2)))


class GPTBlock(nn.Module):
    """A block of layer norm and causal attention, layer norm and an MLP four times as wide, each added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(x)
        q, k, v = (layer(normed).unflatten(2, (self.heads, -1)).transpose(1, 2)
                   for layer in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A model of codes: int64 [n, length], the condition's first → logits [n, length, K] of what follows each."""

    def __init__(self, codes: int = 64, width: int = 32, heads: int = 4, blocks: int = 2, length: int = 512) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(codes, width), nn.Parameter(0.1 * torch.randn(1, length, width))
        self.blocks = nn.Sequential(*(GPTBlock(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, codes, bias=False)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.embedding(codes) + self.positions[:, :codes.shape[1]])))
