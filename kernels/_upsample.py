"""Parts that the upsampling kernels share: the position of every output between the sources, and the
stretched rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Stretch(NamedTuple):
    """One axis of a bilinear upsampling as in torch's ``interpolate``."""

    first: Tensor
    """[outputs] int32: the source before every output."""
    share: Tensor
    """[outputs] float32: the weight of the source after it."""
    start: Tensor
    """[sources + 1] int32: outputs ``start[i]`` to ``start[i + 1]`` have ``first == i``."""


def stretches(
    like: Tensor, sources: tuple[int, int], outputs: tuple[int, int], align_corners: bool
) -> tuple[Stretch, Stretch]:
    """The tables of rows and columns, on the device of ``like``.

    Every call computes them anew, in one launch. Cached tables would not exist yet if the first call is
    captured in a CUDA graph, and tables computed in a capture would be in the memory of that graph.
    """
    device = like.device
    rows, columns = (
        Stretch(
            torch.empty(count, dtype=torch.int32, device=device),
            torch.empty(count, dtype=torch.float32, device=device),
            torch.empty(size + 1, dtype=torch.int32, device=device),
        )
        for size, count in zip(sources, outputs, strict=True)
    )
    longest = max(*outputs, sources[0] + 1, sources[1] + 1)
    steps = max(outputs).bit_length()
    stretch_tables[(triton.cdiv(longest, 128), 2)](
        *rows, *columns, *sources, *outputs, steps, ALIGN=align_corners, BL=128, num_warps=4
    )
    return rows, columns


@triton.jit
def source_before(x, sources, outputs, ALIGN: tl.constexpr):
    """For outputs ``x``: the source before each, and the weight of the source after it (float64)."""
    sources_f, outputs_f = tl.cast(sources, tl.float64), tl.cast(outputs, tl.float64)
    # Positions are float64, so that rounding neither moves an output past a source nor changes its share.
    if ALIGN:
        # as `x`
        place = x.to(tl.float64) * tl.where(outputs > 1, (sources_f - 1) / tl.maximum(outputs_f - 1, 1), 0.0)
    else:
        place = tl.maximum((x.to(tl.float64) + 0.5) * (sources_f / outputs_f) - 0.5, 0.0)  # as `x`
    first = tl.minimum(place.to(tl.int32), sources - 1)  # as `x`
    return first, place - first.to(tl.float64)


@triton.jit
def axis_tables(
    first_out, share_out, start_out, sources, outputs, steps, ALIGN: tl.constexpr, BL: tl.constexpr
):
    """The tables of one axis; a program computes ``BL`` entries of each."""
    i = tl.program_id(0) * BL + tl.arange(0, BL)  # [BL]
    # The tables have different lengths, so each has its own mask.
    first, share = source_before(i, sources, outputs, ALIGN)  # [BL] each
    tl.store(first_out + i, first, mask=i < outputs)
    tl.store(share_out + i, share.to(tl.float32), mask=i < outputs)
    # The starts come from a bisection of the same positions, so that they agree with the table of sources.
    low = tl.zeros((BL,), tl.int32)  # [BL]
    high = low + outputs  # [BL]
    for _ in range(steps):  # the first output whose source is i or later
        middle = (low + high) // 2  # [BL]
        first, _share = source_before(middle, sources, outputs, ALIGN)
        later = (first < i) & (low < high)  # [BL]
        high = tl.where(later, high, middle)
        low = tl.where(later, middle + 1, low)
    tl.store(start_out + i, low, mask=i <= sources)


@triton.jit
def stretch_tables(
    row_first,
    row_share,
    row_start,
    column_first,
    column_share,
    column_start,
    h,
    w,
    height,
    width,
    steps,
    ALIGN: tl.constexpr,
    BL: tl.constexpr,
):
    """A program per axis and ``BL`` of its entries."""
    # The tables are short, so one launch computes those of both axes.
    if tl.program_id(1) == 0:
        axis_tables(row_first, row_share, row_start, h, height, steps, ALIGN, BL)
    else:
        axis_tables(column_first, column_share, column_start, w, width, steps, ALIGN, BL)


def owned_columns(outputs: int, sources: int, width: int, most: int) -> int:
    """Number of source columns of a program that gathers a gradient from about ``outputs`` of the ``width``
    outputs."""
    return max(1, min(most, outputs * sources // max(width, 1) - 1))


@triton.jit
def program_block(rows, columns, BR: tl.constexpr, BC: tl.constexpr):
    """The program's image (int64), and the first row and column of its block of ``BR`` by ``BC``."""
    # Programs are numbered along the columns first, so that neighbours share source rows in the cache.
    across = tl.cdiv(columns, BC)
    down = tl.cdiv(rows, BR)
    pid = tl.program_id(0)
    return (pid // (across * down)).to(tl.int64), pid // across % down * BR, pid % across * BC


@triton.jit
def outputs_around(column_start, c0, w, OWNED: tl.constexpr):
    """The outputs that touch ``OWNED`` source columns from ``c0``: the first, and the one after the last."""
    # An output reads a source and the next one, so the run begins at the column before the owned ones.
    return tl.load(column_start + tl.maximum(c0 - 1, 0)), tl.load(column_start + tl.minimum(c0 + OWNED, w))


@triton.jit
def output_columns(start, end, column_first, column_share, BX: tl.constexpr):
    """Outputs [BX] from ``start``, which of them are before ``end``, and their entries in the two tables."""
    x = start + tl.arange(0, BX)  # [BX], as all return values
    ok = x < end  # [BX]
    return x, ok, tl.load(column_first + x, mask=ok, other=0), tl.load(column_share + x, mask=ok, other=0.0)


@triton.jit
def bounded(x):
    """``x`` with -inf, the logit of a masked class, as a finite number, because -inf - (-inf) is NaN."""
    return tl.where(x < -1.5e38, -1.5e38, x)


@triton.jit
def stretched_rows(planes, r, h, w, first, share, mask):
    """Source rows ``r`` and the next, stretched to the outputs: two tiles as ``mask`` in float32.

    ``planes`` points to the first source of one plane, or of several planes in a column; ``first`` and
    ``share`` belong to the outputs along a row.
    """
    # The last source has no next one and is used twice.
    second = tl.minimum(first + 1, w - 1)  # as `first`
    upper = planes + tl.cast(r, tl.int64) * w  # as `planes`
    lower = planes + tl.cast(tl.minimum(r + 1, h - 1), tl.int64) * w  # as `planes`
    # Rows are stretched in float32 for every type of scores: all outputs in between are computed from them.
    a = bounded(tl.load(upper + first, mask=mask, other=0.0).to(tl.float32))  # as `mask`
    b = bounded(tl.load(upper + second, mask=mask, other=0.0).to(tl.float32))  # as `mask`
    top = a + share * (b - a)  # as `mask`
    a = bounded(tl.load(lower + first, mask=mask, other=0.0).to(tl.float32))
    b = bounded(tl.load(lower + second, mask=mask, other=0.0).to(tl.float32))
    return top, a + share * (b - a)


@triton.jit
def stretched_block(
    scores,
    column_first,
    column_share,
    classes,
    h,
    w,
    width,
    KP: tl.constexpr,
    BX: tl.constexpr,
):
    """The program's image, source row and outputs [BX] along it, the classes [KP], the two stretched rows."""
    b, r, start = program_block(h, width, 1, BX)
    x, ok, first, share = output_columns(start, width, column_first, column_share, BX)  # [BX] each
    # Classes are int64, because offsets of planes computed from them exceed 32 bits.
    k = tl.arange(0, KP).to(tl.int64)  # [KP]
    plane = tl.cast(h, tl.int64) * w
    planes = scores + b * classes * plane + k[:, None] * plane  # [KP, 1]
    mask = (k < classes)[:, None] & ok[None, :]  # [KP, BX]
    top, bottom = stretched_rows(planes, r, h, w, first[None, :], share[None, :], mask)  # [KP, BX] each
    return b, r, x, k, top, bottom


@triton.jit
def column_weights(first, share, w, columns):
    """[outputs, columns]: the weight of every source column in every output."""
    second = tl.minimum(first + 1, w - 1)  # [outputs]
    # At the border both weights of an output fall on the same column, so they are added.
    weight = tl.where(first[:, None] == columns[None, :], 1.0 - share[:, None], 0.0)  # [outputs, columns]
    return weight + tl.where(second[:, None] == columns[None, :], share[:, None], 0.0)


@triton.jit
def store_gradient_row(planes, columns, r, h, w, upper, lower, mask):
    """Write source row ``r`` of a gradient. ``upper`` is its part from the outputs around it, ``lower`` the
    part of the next row from the outputs below it."""
    # the last source row has no next row and takes that share itself
    gradient = tl.where(r == h - 1, upper + lower, upper)  # as `upper`
    tl.store(planes + tl.cast(r, tl.int64) * w + columns[None, :], gradient, mask=mask)
