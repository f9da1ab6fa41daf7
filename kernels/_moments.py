"""Row temperatures from one pass over similarity tiles. Each tile is reduced to a mean and a sum of squared
deviations per row and per column, which are merged by Chan's formula. If query and key are the same tensor,
the upper half of the tiles is enough. Rows are processed in chunks whose partial results stay within
:data:`PANEL_BYTES`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._common import (
    EPS_STD,
    INTERPRETED,
    PANEL_BYTES,
    ROUNDING,
    Side,
    divides,
    grouped,
    product_strip,
    tile_product,
    tile_shape,
)
from fastuda.kernels._panels import Panel


def tile_temperatures(source: Side, target: Side | None, library: bool = False) -> tuple[Tensor, Tensor]:
    """``([B, N], [B, M])`` for rows and columns; without ``target`` both of an image against itself."""
    other = target or source
    batch, n, c = source.query.shape
    m = other.key.shape[1]
    shape = tile_shape(source.query)
    square = target is None
    if square:
        shape["BN"] = shape["BM"] = min(shape["BM"], shape["BN"])
    height, width = shape["BM"], shape["BN"]
    blocks, splits = triton.cdiv(n, height), triton.cdiv(m, width)
    chunk = min(blocks, max(1, PANEL_BYTES // (8 * batch * (splits * height + m))))
    if library:
        panel = Panel(source.row, m, c, n, count=0, products=1)
        chunk = min(chunk, triton.cdiv(panel.rows, height))
    row_part = source.row.new_empty(2, batch, splits, chunk * height)
    products, stride = row_part, 0  # any address will do: with tiles, the kernel does not read it
    col_part = source.row.new_empty(2, batch, chunk, m)
    rows = source.row.new_empty(3, batch, n)
    cols = rows if square else source.row.new_empty(3, batch, m)
    for first in range(0, blocks, chunk):
        here = min(chunk, blocks - first)
        if library:
            part = slice(first * height, min((first + here) * height, n))
            # with SQUARE, columns before the rows are skipped
            products = panel.product(source.query[0, part], other.key[0], part.start if square else 0)
            stride = panel.stride
        tile_moments[(here * splits, batch)](
            source.query,
            other.key,
            source.row,
            other.row,
            *row_part,
            *col_part,
            products,
            stride,
            n,
            m,
            c,
            first,
            here,
            chunk,
            splits,
            SQUARE=square,
            LIBRARY=library,
            EVEN=divides(source.query, shape["BK"]),
            UPCAST=INTERPRETED,
            GROUP=8,
            **shape,
        )
        # with SQUARE, the columns first; the row parts have the row's own tile and those after it
        _merge(col_part, cols, 0, n, height, first, here, below=square)
        _merge(row_part, rows, first * height, m, width, 0, splits, above=square)
    return rows[2], cols[2]


def _merge(
    part: Tensor,
    into: Tensor,
    start: int,
    total: int,
    width: int,
    first: int,
    count: int,
    *,
    below: bool = False,
    above: bool = False,
) -> None:
    """Merge the ``count`` parts from number ``first`` of ``total`` values into the moments and temperatures
    [3, B, L] from ``start``. ``below`` and ``above`` select parts below, or not below, the row's block."""
    _, batch, stride, length = part.shape
    length = min(length, into.shape[2] - start)
    merge_moments[(triton.cdiv(length, 64), batch)](
        *part,
        *into,
        start,
        length,
        part.shape[3],
        into.shape[2],
        total,
        width,
        first,
        count,
        stride,
        BELOW=below,
        ABOVE=above,
        EPS=EPS_STD,
        ROUNDING=ROUNDING,
        BP=16,
        BL=64,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["first", "blocks", "splits"])
def tile_moments(
    a,
    b,
    inv_a,
    inv_b,
    row_mean,
    row_m2,
    col_mean,
    col_m2,
    products,
    product_stride,
    n,
    m,
    channels,
    first,
    blocks,
    stride,
    splits,
    SQUARE: tl.constexpr,
    LIBRARY: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Mean and sum of squared deviations of one cosine tile per row ([B, splits, stride BM]) and column
    ([B, stride, M]), for row blocks from ``first``. ``SQUARE``: one image with itself, only upper tiles."""
    # Programs that run together share operands, which therefore stay in L2.
    block, split = grouped(tl.program_id(0), blocks, splits, GROUP)
    # The matrix is symmetric: a tile below the diagonal has the moments of its transpose above it.
    if SQUARE:  # noqa: SIM102 (one is a constant, the other a tensor)
        if split < first + block:
            return
    batch = tl.program_id(1).to(tl.int64)
    # Rows and columns past the end read the last one, a valid address; their results are masked.
    rows = (first + block) * BM + tl.arange(0, BM)  # [BM]
    cols = split * BN + tl.arange(0, BN)  # [BN]
    row_ok = rows < n  # [BM]
    col_ok = cols < m  # [BN]
    at_row = batch * n + tl.minimum(rows, n - 1)  # [BM]
    at_col = batch * m + tl.minimum(cols, m - 1)  # [BN]
    # Norms are applied after the product, in float32, so that half-precision features enter it unrounded.
    if LIBRARY:
        s = product_strip(products, rows - first * BM, cols, n - first * BM, m, product_stride)  # [BM, BN]
    else:
        s = tile_product(a, b, at_row, at_col, channels, BM, BN, BK, EVEN, UPCAST)  # [BM, BN]
    s = s * tl.load(inv_a + at_row)[:, None] * tl.load(inv_b + at_col)[None, :]

    # Deviations are from the tile's own mean, because sums of squares cancel if similarities are close.
    count = tl.minimum(m - split * BN, BN).to(tl.float32)
    mean = tl.sum(tl.where(col_ok[None, :], s, 0.0), 1) / count  # [BM]
    d = tl.where(col_ok[None, :], s - mean[:, None], 0.0)  # [BM, BN]
    to = (batch * splits + split) * (stride * BM) + block * BM + tl.arange(0, BM)  # [BM]
    tl.store(row_mean + to, mean, mask=row_ok)
    tl.store(row_m2 + to, tl.sum(d * d, 1), mask=row_ok)

    if SQUARE:  # the row part of the diagonal tile already covers these
        col_ok = col_ok & (split > first + block)
    # Columns are reduced from the same registers, so the second direction needs no product of its own.
    count = tl.minimum(n - (first + block) * BM, BM).to(tl.float32)
    mean = tl.sum(tl.where(row_ok[:, None], s, 0.0), 0) / count  # [BN]
    d = tl.where(row_ok[:, None], s - mean[None, :], 0.0)  # [BM, BN]
    to = (batch * stride + block) * m + cols  # [BN]
    tl.store(col_mean + to, mean, mask=col_ok)
    tl.store(col_m2 + to, tl.sum(d * d, 0), mask=col_ok)


@triton.jit(
    do_not_specialize=["start", "first", "count"],
    do_not_specialize_on_alignment=["mean_io", "m2_io", "temperature"],
)
def merge_moments(
    part_mean,
    part_m2,
    mean_io,
    m2_io,
    temperature,
    start,
    length,
    part_length,
    whole_length,
    total,
    width,
    first,
    count,
    stride,
    BELOW: tl.constexpr,
    ABOVE: tl.constexpr,
    EPS: tl.constexpr,
    ROUNDING: tl.constexpr,
    BP: tl.constexpr,
    BL: tl.constexpr,
):
    """Merge parts ``first`` to ``first + count`` into the moments so far (Chan et al. 1979), and compute the
    temperatures so far. Each part covers up to ``width`` of the ``total`` values."""
    batch = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BL + tl.arange(0, BL)  # [BL]
    ok = at < length  # [BL]
    own = (start + at) // width  # [BL] the block of a row
    # Each row has its own range of parts: the upper tiles give some of its parts by column, the rest by row.
    low = tl.zeros((BL,), tl.int32) + first  # [BL]
    high = low + count  # [BL]
    if BELOW:
        high = tl.minimum(high, own)
    if ABOVE:
        low = tl.maximum(low, own)
    before = tl.minimum(low * width, total).to(tl.float32)  # [BL]
    after = tl.minimum(high * width, total).to(tl.float32)  # [BL]
    # Rows without a part here keep their moments.
    ok = ok & (high > low)
    to = batch * whole_length + start + at  # [BL]
    # Before part 0 nothing is merged, and the memory is uninitialised.
    old = tl.load(mean_io + to, mask=ok & (low > 0), other=0.0)  # [BL]
    p = tl.arange(0, BP)  # [BP]
    # The mean is complete before deviations from it are computed; parts are added in a fixed order.
    weighted = old * before  # [BL]
    for step in range(0, count, BP):
        part = first + step + p  # [BP]
        values = tl.minimum(total - part * width, width).to(tl.float32)  # [BP]
        where = (batch * stride + step + p)[:, None] * part_length + at[None, :]  # [BP, BL]
        mask = (part[:, None] >= low[None, :]) & (part[:, None] < high[None, :]) & ok[None, :]  # [BP, BL]
        weighted += tl.sum(tl.load(part_mean + where, mask=mask, other=0.0) * values[:, None], 0)
    mean = weighted / tl.maximum(after, 1.0)  # [BL]
    # A part adds its own squares and the square of its mean's distance: no term is negative, so none cancel.
    m2 = tl.load(m2_io + to, mask=ok & (low > 0), other=0.0) + before * (old - mean) * (old - mean)  # [BL]
    for step in range(0, count, BP):
        part = first + step + p
        values = tl.minimum(total - part * width, width).to(tl.float32)
        where = (batch * stride + step + p)[:, None] * part_length + at[None, :]
        mask = (part[:, None] >= low[None, :]) & (part[:, None] < high[None, :]) & ok[None, :]
        d = tl.load(part_mean + where, mask=mask, other=0.0) - mean[None, :]  # [BP, BL]
        inner = tl.load(part_m2 + where, mask=mask, other=0.0)  # [BP, BL]
        m2 += tl.sum(tl.where(mask, inner + d * d * values[:, None], 0.0), 0)
    # A deviation that is only rounding counts as none, because dividing by it would magnify the rounding.
    std = tl.sqrt(m2 / tl.maximum(after - 1, 1.0))  # [BL]
    rounding = ROUNDING * tl.maximum(tl.abs(mean), 1.0)  # [BL]
    tl.store(mean_io + to, mean, mask=ok)
    tl.store(m2_io + to, m2, mask=ok)
    tl.store(temperature + to, tl.where(std <= rounding, 1.0, std + EPS), mask=ok)
