"""The aggregation's gradient through the KL similarity, for features too wide for sums in registers: panels
of rows, all in float32."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._aggregate_block import gradient_products
from fastuda.kernels._common import (
    INTERPRETED,
    LOG2E,
    Side,
    add_product,
    divides,
    panel_tile,
    quarters,
    tile_shape,
)
from fastuda.kernels._panels import Panel


def divergence_gradient(
    side: Side,
    b: int,
    temperature: Tensor,
    log_sum: Tensor,
    grad: Tensor,
    centre: Tensor,
    factor: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """``H key``, ``H^T query`` and ``W^T grad`` [N, C] of image ``b``, where ``W`` are its softmax weights
    and ``H`` is the gradient of the products of query and key.

    ``centre`` [N] is an estimate of the weighted mean gradient of a row's weights; ``factor`` [N] scales a
    row of ``H``."""
    query, key = side.query[b], side.key[b]
    n, c = query.shape
    by_query, by_key, by_values = query.new_zeros(3, n, c)
    scratch = Panel(query, n, c, n, count=2)
    for start in range(0, n, scratch.rows):
        part = slice(start, min(start + scratch.rows, n))
        weights, slopes = (scratch.view(part.stop - start, n, i) for i in (0, 1))
        _fill_slopes(weights, slopes, side, b, start, temperature, log_sum, grad, centre, factor)
        add_product(by_values, weights.T, grad[part])
        add_product(by_key, slopes.T, query[part])
        add_product(by_query[part], slopes, key)
    return by_query, by_key, by_values


def _fill_slopes(
    weights: Tensor,
    slopes: Tensor,
    side: Side,
    b: int,
    start: int,
    temperature: Tensor,
    log_sum: Tensor,
    grad: Tensor,
    centre: Tensor,
    factor: Tensor,
) -> None:
    """The softmax ``weights`` of the rows from ``start``, and ``slopes``, the gradient with respect to their
    products with the keys. A second step removes the error of the estimated centre, because logarithms would
    magnify it."""
    shape = tile_shape(weights)
    rows, n = weights.shape
    blocks, splits = triton.cdiv(rows, shape["BM"]), triton.cdiv(n, shape["BN"])
    sums = weights.new_empty(splits, rows)
    slope_panel[(blocks * splits,)](
        side.query[b],
        side.key[b],
        grad,
        side.row[b],
        temperature,
        log_sum,
        centre,
        weights,
        slopes,
        sums,
        weights.stride(0),
        start,
        rows,
        n,
        side.query.shape[2],
        blocks,
        splits,
        LOG2E=LOG2E,
        EVEN=divides(side.query, shape["BK"]),
        UPCAST=INTERPRETED,
        GROUP=8,
        **shape,
    )
    height, width = (64, 256) if INTERPRETED else (1, 2048)
    centre_slopes[(triton.cdiv(rows, height), triton.cdiv(n, width))](
        weights,
        slopes,
        sums.sum(0),
        factor[start : start + rows],
        weights.stride(0),
        rows,
        BR=height,
        BC=width,
        num_warps=4,
    )


@triton.jit(
    do_not_specialize=["first", "blocks", "splits"],
    do_not_specialize_on_alignment=["row", "temperature", "log_sum"],
)
def slope_panel(
    a,
    b,
    g,
    row,
    temperature,
    log_sum,
    centre,
    weights,
    slopes,
    sums,
    stride,
    first,
    n,
    m,
    channels,
    blocks,
    splits,
    LOG2E: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Weights, their gradient minus ``centre``, and partial sums of the product of both."""
    _, split, rows, at_row, at_col = panel_tile(n, m, blocks, splits, GROUP, BM, BN)
    at_row += first
    # both [BM, BN]
    d, s, _ = gradient_products(a, g, b, at_row, at_col, channels, False, BM, BN, BK, EVEN, UPCAST)
    entropy = tl.load(row + at_row)  # [BM]
    inv = LOG2E / tl.load(temperature + at_row)  # [BM]
    norm = tl.load(log_sum + at_row) * LOG2E  # [BM]
    middle = tl.load(centre + at_row)  # [BM]
    # The epilogue works on four strips of columns; for whole tiles its vectors would spill.
    parts = quarters(s, BM, BN)  # four of [BM, BN // 4]
    d_parts = quarters(d, BM, BN)  # four of [BM, BN // 4]
    total = tl.zeros((BM,), tl.float32)  # [BM]
    for strip in tl.static_range(4):
        cols = split * BN + strip * (BN // 4) + tl.arange(0, BN // 4)  # [BN // 4]
        col_ok = cols < m  # [BN // 4]
        # A pixel's divergence from itself is set to exactly 0.
        s = parts[strip] + entropy[:, None]  # [BM, BN // 4]
        s = tl.where(cols[None, :] == (first + rows)[:, None], 0.0, s)
        # A weight is clamped to 1: at a vanishing temperature, rounding could make it infinite.
        w = tl.exp2(tl.minimum(s * inv[:, None] - norm[:, None], 0.0))  # [BM, BN // 4]
        w = tl.where(col_ok[None, :], w, 0.0)
        d = d_parts[strip] - middle[:, None]  # [BM, BN // 4]
        # The centre is an estimate. Its error is summed here, and centre_slopes subtracts it.
        total += tl.sum(w * d, 1)
        # Zeros fill a row up to its stride, so that stores are 16 bytes wide.
        to = rows.to(tl.int64)[:, None] * stride + cols[None, :]  # [BM, BN // 4]
        mask = (rows < n)[:, None] & (cols < stride)[None, :]  # [BM, BN // 4]
        tl.store(weights + to, w, mask=mask)
        tl.store(slopes + to, tl.where(col_ok[None, :], d, 0.0), mask=mask)
    # Each column split writes its own sums; torch adds them in a fixed order.
    tl.store(sums + split.to(tl.int64) * n + rows, total, mask=rows < n)


@triton.jit(do_not_specialize_on_alignment=["factor"])
def centre_slopes(
    weights,
    slopes,
    mean,
    factor,
    stride,
    n,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """``slopes = weights (slopes - mean) factor``."""
    # A row's mean error is known only after its whole width, which is why this is a separate kernel.
    rows = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    cols = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    row_ok = rows < n  # [BR]
    mask = row_ok[:, None] & (cols < stride)[None, :]  # [BR, BC]: zeros stay zeros
    at = rows[:, None] * stride + cols[None, :]  # [BR, BC]
    w = tl.load(weights + at, mask=mask, other=0.0)  # [BR, BC]
    d = tl.load(slopes + at, mask=mask, other=0.0)  # [BR, BC]
    d = w * (d - tl.load(mean + rows, mask=row_ok, other=0.0)[:, None])
    d = d * tl.load(factor + rows, mask=row_ok, other=0.0)[:, None]
    tl.store(slopes + at, d, mask=mask)
