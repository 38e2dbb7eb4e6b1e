"""The Triton kernels of group norm, whose formula and launches are in `group_norm.py`.

The kernels work on tiles [ROWS positions, COLS channels] of one image. The channels are `cols` in number, and belong to
at most GROUPS groups; programs are (channel slabs, chunks of positions, images).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _slab(
    channels: tl.tensor, per_group: tl.tensor, cols: tl.tensor, COLS: tl.constexpr, GROUPS: tl.constexpr,
    ALIGN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return the channels of this program: the first, which exist [COLS]; its group, groups from there, the members."""
    cols = cols // ALIGN * ALIGN  # tells the compiler that masks change at multiples of ALIGN only: wide loads
    channel = tl.multiple_of(tl.program_id(0) * cols, ALIGN)
    column = tl.arange(0, COLS)
    exists = (column < cols) & (channel + column < channels)
    group = channel // per_group
    member = ((channel + column) // per_group - group)[None, :] == tl.arange(0, GROUPS)[:, None]
    return channel, exists, group, channels // per_group - group, member & exists[None, :]


@triton.jit
def _offsets(
    channel: tl.tensor, first: tl.tensor, positions: tl.tensor, channels: tl.tensor,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return where the tile at (first, channel) begins, and the offsets [ROWS, COLS] within it."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    image = tl.program_id(2).to(tl.int64) * positions * channels
    if CHANNELS_LAST:
        return image + tl.cast(first, tl.int64) * channels + channel, row * channels + column
    else:
        return image + tl.cast(channel, tl.int64) * positions + first, column * positions + row


@triton.jit
def _to_groups(by_channel: tl.tensor, member: tl.tensor) -> tl.tensor:
    return tl.sum(tl.where(member, by_channel[None, :], 0.0), 1)


@triton.jit
def _to_channels(by_group: tl.tensor, member: tl.tensor) -> tl.tensor:
    return tl.sum(tl.where(member, by_group[:, None], 0.0), 0)


@triton.jit
def _finish(
    x: tl.tensor, mean: tl.tensor, scale: tl.tensor, bias: tl.tensor, silu: tl.tensor
) -> tl.tensor:
    y = (x - mean[None, :]) * scale[None, :] + bias[None, :]
    if silu != 0:
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def whole_kernel(
    x_ptr: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor, out_ptr: tl.tensor,
    positions: tl.tensor, channels: tl.tensor, per_group: tl.tensor, cols: tl.tensor, silu: tl.tensor, eps: tl.tensor,
    ROWS: tl.constexpr, COLS: tl.constexpr, GROUPS: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
) -> None:
    """Normalise whole groups in registers: ROWS ≥ positions."""
    channel, in_col, _, _, member = _slab(channels, per_group, cols, COLS, GROUPS, ALIGN)
    start, offsets = _offsets(channel, 0, positions, channels, ROWS, COLS, CHANNELS_LAST)
    exists = (tl.arange(0, ROWS) < positions)[:, None] & in_col[None, :]
    x = tl.load(x_ptr + start + offsets, mask=exists, other=0.0).to(tl.float32)
    n = tl.cast(positions * per_group, tl.float32)
    mean = _to_channels(_to_groups(tl.sum(x, 0), member) / n, member)
    centred = tl.where(exists, x - mean[None, :], 0.0)
    var = _to_groups(tl.sum(centred * centred, 0), member) / n
    column = channel + tl.arange(0, COLS)
    weight = tl.load(weight_ptr + column, mask=in_col, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=in_col, other=0.0).to(tl.float32)
    y = _finish(x, mean, _to_channels(tl.rsqrt(var + eps), member) * weight, bias, silu)
    tl.store(out_ptr + start + offsets, y.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def statistics_kernel(
    x_ptr: tl.tensor, parts_ptr: tl.tensor,
    positions: tl.tensor, channels: tl.tensor, per_group: tl.tensor, cols: tl.tensor, chunk: tl.tensor,
    ROWS: tl.constexpr, COLS: tl.constexpr, GROUPS: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
) -> None:
    """Write (n, mean, M2) of every group in `chunk` positions into parts [images, 3, groups, chunks].

    Every element of the tile runs Welford's recurrence over the tiles of the chunk; the elements are merged at the end.
    """
    channel, in_col, group, groups, member = _slab(channels, per_group, cols, COLS, GROUPS, ALIGN)
    first = tl.program_id(1) * chunk
    start, offsets = _offsets(channel, first, positions, channels, ROWS, COLS, CHANNELS_LAST)
    step = tl.cast(channels, tl.int64) if CHANNELS_LAST else 1
    row = tl.arange(0, ROWS)
    length = tl.minimum(chunk, positions - first)
    seen = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, COLS], tl.float32)
    m2 = tl.zeros([ROWS, COLS], tl.float32)
    for done in tl.range(0, length, ROWS):
        in_row = first + done + row < positions
        exists = in_row[:, None] & in_col[None, :]
        x = tl.load(x_ptr + start + done * step + offsets, mask=exists, other=0.0).to(tl.float32)
        seen += in_row.to(tl.float32)
        share = tl.where(in_row, 1.0 / tl.maximum(seen, 1.0), 0.0)
        delta = x - mean
        mean += delta * share[:, None]
        m2 += tl.where(in_row[:, None], delta * (x - mean), 0.0)
    n = length.to(tl.float32) * per_group
    centre = _to_groups(tl.sum(mean * seen[:, None], 0), member) / n
    away = mean - _to_channels(centre, member)[None, :]
    m2 = _to_groups(tl.sum(m2 + away * away * seen[:, None], 0), member)
    index = tl.arange(0, GROUPS)
    total, parts = channels // per_group, tl.num_programs(1)
    out = parts_ptr + (tl.program_id(2) * 3 * total + group + index) * parts + tl.program_id(1)
    mine = (index < groups) & (index < tl.cdiv(cols, per_group))
    tl.store(out, tl.zeros([GROUPS], tl.float32) + n, mask=mine)
    tl.store(out + total * parts, centre, mask=mine)
    tl.store(out + 2 * total * parts, m2, mask=mine)


@triton.jit
def normalise_kernel(
    x_ptr: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor, parts_ptr: tl.tensor, out_ptr: tl.tensor,
    positions: tl.tensor, channels: tl.tensor, per_group: tl.tensor, cols: tl.tensor, chunk: tl.tensor,
    parts: tl.tensor, silu: tl.tensor, eps: tl.tensor,
    ROWS: tl.constexpr, COLS: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
) -> None:
    """Merge `parts` parts of the statistics, as `statistics_kernel` left them, and normalise `chunk` positions."""
    channel, in_col, group, groups, member = _slab(channels, per_group, cols, COLS, GROUPS, ALIGN)
    index, part = tl.arange(0, GROUPS)[:, None], tl.arange(0, PARTS)[None, :]
    total = channels // per_group
    at = parts_ptr + (tl.program_id(2) * 3 * total + group + index) * parts + part
    known = (index < groups) & (part < parts)
    n_part = tl.load(at, mask=known, other=0.0)
    mean_part = tl.load(at + total * parts, mask=known, other=0.0)
    m2_part = tl.load(at + 2 * total * parts, mask=known, other=0.0)
    n = tl.maximum(tl.sum(n_part, 1), 1.0)
    centre = tl.sum(n_part * mean_part, 1) / n
    away = mean_part - centre[:, None]
    var = tl.sum(m2_part + n_part * away * away, 1) / n

    column = channel + tl.arange(0, COLS)
    weight = tl.load(weight_ptr + column, mask=in_col, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=in_col, other=0.0).to(tl.float32)
    mean, scale = _to_channels(centre, member), _to_channels(tl.rsqrt(var + eps), member) * weight
    first = tl.program_id(1) * chunk
    start, offsets = _offsets(channel, first, positions, channels, ROWS, COLS, CHANNELS_LAST)
    step = tl.cast(channels, tl.int64) if CHANNELS_LAST else 1
    length = tl.minimum(chunk, positions - first)
    row = tl.arange(0, ROWS)
    for done in tl.range(0, length, ROWS):
        exists = (first + done + row < positions)[:, None] & in_col[None, :]
        here = start + done * step
        x = tl.load(x_ptr + here + offsets, mask=exists, other=0.0).to(tl.float32)
        y = _finish(x, mean, scale, bias, silu)
        tl.store(out_ptr + here + offsets, y.to(out_ptr.dtype.element_ty), mask=exists)
