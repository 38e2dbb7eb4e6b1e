"""First weights of the UNet that do what it would otherwise take long to learn; all of them are trained afterwards."""

from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import nn

CONSTANT = 8.0  # carried in two channels, + and -, of a norm's group: it outweighs the rest and fixes their deviation


@torch.no_grad()
def start_as_copy(unet: UNet2DConditionModel) -> None:
    """Change the first weights of a UNet so that it returns its input, which is what the noise is at high noise.

    There a picture of deviation 0.5 weighs 0.03 in the input: to say anything of it, the output must repeat the input
    to within a per cent, through a group norm and a SiLU. Each latent channel x takes the last skip connection to that
    norm as x and -x, since silu(x) - silu(-x) = x, in a group with two constants that outweigh it and so fix the norm's
    deviation. What is left for training to learn is the picture.
    """
    latents, width, size = unet.conv_in.in_channels, unet.conv_in.out_channels, unet.conv_norm_out.num_channels
    group = size // unet.conv_norm_out.num_groups
    if group < 6 or latents != 4:
        raise ValueError(f"got groups of {group} channels and {latents} latents, expected at least 6 and 4")
    last = unet.up_blocks[-1].resnets[-1]
    carried = [*range(group), *range(group, 2 * group)]
    for layer in (last.conv_shortcut, last.conv2):
        layer.weight[carried] = 0
        layer.bias[carried] = 0
    unet.conv_in.weight[:latents] = 0
    unet.conv_in.bias[:latents] = 0
    unet.conv_out.weight.zero_()
    unet.conv_out.bias.zero_()
    for c in range(latents):
        start = c // 2 * group
        plus, minus = start + c % 2 * 2, start + c % 2 * 2 + 1
        unet.conv_in.weight[c, c, 1, 1] = 1
        last.conv_shortcut.weight[plus, width + c] = 1
        last.conv_shortcut.weight[minus, width + c] = -1
        unet.conv_out.weight[c, plus, 1, 1] = 1
        unet.conv_out.weight[c, minus, 1, 1] = -1
    for start in (0, group):
        last.conv_shortcut.bias[start + 4] = CONSTANT
        last.conv_shortcut.bias[start + 5] = -CONSTANT
    unet.conv_norm_out.weight[carried] = ((4 + 2 * CONSTANT**2) / group) ** 0.5  # undoes the division by the deviation


@torch.no_grad()
def start_with_positions(unet: UNet2DConditionModel) -> None:
    """Change the first weights of a UNet of three levels so that its attention knows where in the picture it looks.

    Diffusion UNets have no position embedding; they learn where they are from the zeros around the picture. Slowly:
    trained without this, the UNet soon told pairs that stand side by side from pairs one above the other, but not left
    from right. Here the lowest level, 4x4, marks its four columns and four rows by what a convolution sees of the zeros
    around a constant, and ten channels of every later level with attention carry the marks and the constant.
    """
    first, middle, lowest = unet.down_blocks
    a, b, c = unet.config.block_out_channels
    if lowest.resnets[0].norm1.num_groups * 12 > b or len(unet.up_blocks[0].resnets) != 2:
        raise ValueError(f"got blocks of {a}, {b} and {c} channels, expected three levels with groups of 12 or less")
    for k, sign in ((a - 2, 1), (a - 1, -1)):
        unet.conv_in.weight[k] = 0
        unet.conv_in.bias[k] = sign * CONSTANT
    _carry(first.resnets[0], _last(a, 2), _last(a, 2))
    _carry_conv(first.downsamplers[0].conv, _last(a, 2))
    _carry(middle.resnets[0], _last(a, 2), _last(b, 2))
    _leave(middle.attentions[0], _last(b, 2))
    _carry_conv(middle.downsamplers[0].conv, _last(b, 2))
    _carry(lowest.resnets[0], _last(b, 2), _last(c, 2))
    _mark(lowest.resnets[0], b - 2, _last(c, 10)[:8])
    _leave(lowest.attentions[0], _last(c, 10))

    _carry(unet.mid_block.resnets[0], _last(c, 10), _last(c, 10))
    _leave(unet.mid_block.attentions[0], _last(c, 10))
    _carry(unet.mid_block.resnets[1], _last(c, 10), _last(c, 10))
    for resnet, attention in zip(unet.up_blocks[0].resnets, unet.up_blocks[0].attentions, strict=True):
        _carry(resnet, _last(c, 10), _last(c, 10))
        _leave(attention, _last(c, 10))
    up = unet.up_blocks[0].upsamplers[0].conv
    _carry_conv(up, _last(c, 10))
    for i, k in enumerate(_last(c, 10)[:8]):  # a mark reaches into the next cell, so that 8 columns and rows differ
        line = up.weight[k, k, 1, :] if i < 4 else up.weight[k, k, :, 1]
        line.copy_(torch.tensor([0.25, 0.5, 0.25]))
    sources = _last(c, 10)
    for resnet, attention in zip(unet.up_blocks[1].resnets, unet.up_blocks[1].attentions, strict=True):
        _carry(resnet, sources, _last(b, 10))
        _leave(attention, _last(b, 10))
        sources = _last(b, 10)


def _last(width: int, n: int) -> list[int]:
    return list(range(width - n, width))


def _carry(resnet: nn.Module, sources: Sequence[int], targets: Sequence[int]) -> None:
    """Let a residual block copy channels, of the hidden state where its input holds a skip connection too."""
    resnet.conv2.weight[targets] = 0
    resnet.conv2.bias[targets] = 0
    if resnet.conv_shortcut is not None:
        resnet.conv_shortcut.weight[targets] = 0
        resnet.conv_shortcut.bias[targets] = 0
        resnet.conv_shortcut.weight[targets, sources] = 1


def _carry_conv(conv: nn.Conv2d, channels: Sequence[int]) -> None:
    conv.weight[channels] = 0
    conv.bias[channels] = 0
    conv.weight[channels, channels, 1, 1] = 1


def _leave(attention: nn.Module, channels: Sequence[int]) -> None:
    attention.proj_out.weight[channels] = 0
    attention.proj_out.bias[channels] = 0


def _mark(resnet: nn.Module, constant: int, marks: Sequence[int]) -> None:
    """Let a residual block on 4x4 cells mark columns 0 to 3 and rows 0 to 3 in the channels `marks`."""
    group = resnet.norm2.num_channels // resnet.norm2.num_groups
    edges = _last(resnet.norm2.num_channels, group)
    for layer in (resnet.conv1, resnet.time_emb_proj):
        layer.weight[edges] = 0
        layer.bias[edges] = 0
    # An edge is where the neighbour on one side is missing. The second convolution finds the edges and what is next.
    sides = ((1, 0), (1, 2), (0, 1), (2, 1))
    for edge, (y, x) in zip(edges, sides, strict=False):
        resnet.conv1.weight[edge, constant, 1, 1] = 1
        resnet.conv1.weight[edge, constant, y, x] = -1
    left, right, top, bottom = edges[:4]
    resnet.conv2.weight[marks] = 0
    resnet.conv2.bias[marks] = 0
    for mark, edge, (y, x) in zip(
        marks,
        (left, left, right, right, top, top, bottom, bottom),
        ((1, 1), (1, 0), (1, 2), (1, 1), (1, 1), (0, 1), (2, 1), (1, 1)),
        strict=True,
    ):
        resnet.conv2.weight[mark, edge, y, x] = 1
    if resnet.conv_shortcut is not None:
        resnet.conv_shortcut.weight[marks] = 0
        resnet.conv_shortcut.bias[marks] = 0
