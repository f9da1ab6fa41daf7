"""One pass over similarity tiles: best match and log-sum-exp of every row, and of every column.

A program owns a block of rows and a span of column tiles. Row results stay in registers across the span;
column results go to one partial per row block. Partials are merged in a fixed order, without atomics, so two
runs agree bit for bit. Rows are processed in chunks that keep the column partials within :data:`PANEL_BYTES`.
If the library multiplies, the products stay within it too: a chunk is multiplied into a float32 panel, which
the same kernel reads while it is in L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._best import Best, merge
from fastuda.kernels._common import (
    INTERPRETED,
    LOG2E,
    PANEL_BYTES,
    Side,
    divides,
    grouped,
    product_strip,
    quarters,
    tile_product,
    tile_shape,
)
from fastuda.kernels._panels import Panel

PROGRAMS = 2048
"""Number of programs to aim for: enough for several waves on any GPU, but few enough to keep row partials
small."""


def search(
    source: Side,
    target: Side,
    temperatures: tuple[Tensor, Tensor] | None,
    similarity: str,
    library: bool = False,
) -> tuple[Best, Best]:
    """Both hops. Without temperatures no sum is computed. ``library``: the library multiplies; one image."""
    source_t, target_t = temperatures or (None, None)
    if similarity == "cosine":
        return _pass(source, target, source_t, target_t, kl=False, columns=True, library=library)
    forward, _ = _pass(source, target, source_t, None, kl=True, columns=False, library=library)
    backward, _ = _pass(target, source, target_t, None, kl=True, columns=False, library=library)
    return forward, backward


def _pass(
    query: Side,
    key: Side,
    row_t: Tensor | None,
    col_t: Tensor | None,
    *,
    kl: bool,
    columns: bool,
    library: bool,
) -> tuple[Best, Best]:
    batch, n, c = query.query.shape
    m = key.key.shape[1]
    shape = tile_shape(query.query)
    lse = row_t is not None
    rows, cols = Best.empty(query.row), Best.empty(key.row)
    row_t = query.row if row_t is None else row_t
    col_t = key.row if col_t is None else col_t
    blocks, tiles = triton.cdiv(n, shape["BM"]), triton.cdiv(m, shape["BN"])
    chunk = min(blocks, max(1, PANEL_BYTES // (12 * batch * m))) if columns else blocks
    if library:
        panel = Panel(query.row, m, c, n, count=0, products=1)
        chunk = min(chunk, triton.cdiv(panel.rows, shape["BM"]))
    span = max(1, min(16, batch * chunk * tiles // PROGRAMS))
    splits = triton.cdiv(tiles, span)
    row_part = _partials(query.row, batch, splits, n)
    products, stride = row_part[0], 0  # any address will do: with tiles, the kernel does not read it
    col_part = _partials(query.row, batch, chunk if columns else 0, m)
    for first in range(0, blocks, chunk):
        here = min(chunk, blocks - first)
        if library:
            part = slice(first * shape["BM"], min((first + here) * shape["BM"], n))
            products = panel.product(query.query[0, part], key.key[0])
            stride = panel.stride
        search_tiles[(here * splits, batch)](
            query.query,
            key.key,
            query.row,
            key.row,
            row_t,
            col_t,
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
            span,
            KL=kl,
            LSE=lse,
            LIBRARY=library,
            COLUMNS=columns,
            LOG2E=LOG2E,
            EVEN=divides(query.query, shape["BK"]),
            UPCAST=INTERPRETED,
            GROUP=8,
            **shape,
        )
        if columns:
            merge(col_part, here, chunk, col_t, cols, lse)
    merge(row_part, splits, splits, row_t, rows, lse)
    return rows, cols


def _partials(like: Tensor, batch: int, parts: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    value, total = like.new_empty(2, batch, parts, length)
    return value, torch.empty(value.shape, dtype=torch.int32, device=like.device), total


@triton.jit
def reduce_strip(
    s,  # [BM, BN]: here BN is the strip's width
    start,
    row_ok,  # [BM]
    rows,  # [BM]
    scale_row,  # [BM]
    inv_row,  # [BM]
    best,  # [BM]
    best_index,  # [BM]
    total,  # [BM]
    row_b,
    temperature_b,
    col_value,
    col_index,
    col_sum,
    batch,
    part,
    m,
    KL: tl.constexpr,
    LSE: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOG2E: tl.constexpr,
    BN: tl.constexpr,
):
    """Write the column partials of products ``s``, and merge its rows into the running best and sum."""
    # Columns past the end read the scale of the last one, a valid address; their results are masked.
    cols = start + tl.arange(0, BN)  # [BN]
    col_ok = cols < m  # [BN]
    at_col = batch * m + tl.minimum(cols, m - 1)  # [BN]
    # Norms and entropies are applied after the product, in float32, so that its operands stay unrounded.
    if KL:
        s = s + scale_row[:, None]
    else:
        s = s * scale_row[:, None] * tl.load(row_b + at_col)[None, :]
    if COLUMNS:
        # A column's partial leaves out rows past the end; its match is the lowest row of equal ones.
        below = tl.where(row_ok[:, None], s, float("-inf"))  # [BM, BN]
        value = tl.max(below, 0)  # [BN]
        index = tl.min(tl.where(below == value[None, :], rows[:, None], 2147483647), 0)  # [BN]
        to = part * m + cols  # [BN]
        tl.store(col_value + to, value, mask=col_ok)
        tl.store(col_index + to, index, mask=col_ok)
        if LSE:
            # The sum is relative to the partial's own maximum, so that no exponential overflows.
            inv_col = LOG2E / tl.load(temperature_b + at_col)  # [BN]
            e = tl.exp2((below - value[None, :]) * inv_col[None, :])  # [BM, BN]
            tl.store(col_sum + to, tl.sum(e, 0), mask=col_ok)
    # A row leaves out columns past the end; its match is the lowest column of equal ones.
    s = tl.where(col_ok[None, :], s, float("-inf"))
    value = tl.max(s, 1)  # [BM]
    index = tl.min(tl.where(s == value[:, None], cols[None, :], 2147483647), 1)  # [BM]
    # The running sum is rescaled to the new maximum before a strip is added, so that no exponent is above 0.
    top = tl.maximum(best, value)  # [BM]
    if LSE:
        # A strip past the last column changes nothing.
        total = total * tl.exp2((best - top) * inv_row)
        total += tl.sum(tl.exp2((s - top[:, None]) * inv_row[:, None]), 1)
    return top, tl.where(value > best, index, best_index), total


@triton.jit(do_not_specialize=["first", "blocks", "splits", "span"])
def search_tiles(
    a,
    b,
    row_a,
    row_b,
    temperature_a,
    temperature_b,
    row_value,
    row_index,
    row_sum,
    col_value,
    col_index,
    col_sum,
    products,
    product_stride,
    n,
    m,
    channels,
    first,
    blocks,
    stride,
    splits,
    span,
    KL: tl.constexpr,
    LSE: tl.constexpr,
    LIBRARY: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOG2E: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Row partials [B, splits, N] and column partials [B, stride, M] of the row blocks from ``first``."""
    # Programs that run together share operands, which therefore stay in L2.
    block, split = grouped(tl.program_id(0), blocks, splits, GROUP)
    batch = tl.program_id(1).to(tl.int64)
    # Rows past the end read the last row, a valid address; their results are masked.
    rows = (first + block) * BM + tl.arange(0, BM)  # [BM]
    row_ok = rows < n  # [BM]
    at_row = batch * n + tl.minimum(rows, n - 1)  # [BM]
    scale_row = tl.load(row_a + at_row)  # [BM]
    inv_row = LOG2E / tl.load(temperature_a + at_row)  # [BM]
    # The best and the sum of a row stay in registers over the span; one partial per split is written.
    best = tl.full((BM,), float("-inf"), tl.float32)  # [BM]
    best_index = tl.zeros((BM,), tl.int32)  # [BM]
    total = tl.zeros((BM,), tl.float32)  # [BM]
    # Columns have a line of partials per row block, so that no two programs write to the same place.
    block = batch * stride + block
    # Tiles go from left to right, so that of equal similarities the first column stays the match.
    for start in range(split * span * BN, tl.minimum((split + 1) * span * BN, m), BN):
        if not LIBRARY:
            at_col = batch * m + tl.minimum(start + tl.arange(0, BN), m - 1)  # [BN]
            s = tile_product(a, b, at_row, at_col, channels, BM, BN, BK, EVEN, UPCAST)  # [BM, BN]
            # The epilogue works on four strips of columns; for a whole tile its column vectors would spill.
            parts = quarters(s, BM, BN)  # four of [BM, BN // 4]
        for strip in tl.static_range(4):
            if LIBRARY:
                # The library's panel begins at the first row of the chunk and is read one strip at a time.
                cols = start + strip * (BN // 4) + tl.arange(0, BN // 4)  # [BN // 4]
                # [BM, BN // 4]
                part = product_strip(products, rows - first * BM, cols, n - first * BM, m, product_stride)
            else:
                part = parts[strip]  # [BM, BN // 4]
            best, best_index, total = reduce_strip(
                part,
                start + strip * (BN // 4),
                row_ok,
                rows,
                scale_row,
                inv_row,
                best,
                best_index,
                total,
                row_b,
                temperature_b,
                col_value,
                col_index,
                col_sum,
                batch,
                block,
                m,
                KL,
                LSE,
                COLUMNS,
                LOG2E,
                BN // 4,
            )
    # Each split writes its own partials, which are merged in a fixed order, without atomics.
    to = (batch * splits + split) * n + rows  # [BM]
    tl.store(row_value + to, best, mask=row_ok)
    tl.store(row_index + to, best_index, mask=row_ok)
    if LSE:
        tl.store(row_sum + to, total, mask=row_ok)
