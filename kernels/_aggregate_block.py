"""A tile of the aggregation's gradient through the cosine: both weights and both slopes of two blocks of
pixels, from three products. KL also uses the loop that computes the products of a tile."""

from __future__ import annotations

import triton
import triton.language as tl

from fastuda.kernels._common import narrow, panel_tile, quarters
from fastuda.kernels._panels import saturate


@triton.jit
def gradient_products(
    x,
    g,
    other,
    rows,  # [BM]
    cols,  # [BN]
    channels,
    OWN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``g_i . x_j``, ``x_i . other_j`` and, with ``OWN``, ``x_i . x_j`` of a tile in one loop."""
    k = tl.arange(0, BK)  # [BK]
    at_row = rows[:, None] * channels + k[None, :]  # [BM, BK]
    at_col = cols[None, :] * channels + k[:, None]  # [BK, BN]
    s = tl.zeros((BM, BN), tl.float32)  # [BM, BN]
    p = tl.zeros((BM, BN), tl.float32)  # [BM, BN]
    q = tl.zeros((BM, BN), tl.float32)  # [BM, BN]
    for start in range(0, channels, BK):
        if EVEN:
            x_i = tl.load(x + at_row + start)  # [BM, BK]
            g_i = tl.load(g + at_row + start)  # [BM, BK]
            x_j = tl.load(x + at_col + start)  # [BK, BN]
            other_j = tl.load(other + at_col + start)  # [BK, BN]
        else:
            inside = k < channels - start  # [BK]
            x_i = tl.load(x + at_row + start, mask=inside[None, :], other=0.0)
            g_i = tl.load(g + at_row + start, mask=inside[None, :], other=0.0)
            x_j = tl.load(x + at_col + start, mask=inside[:, None], other=0.0)
            other_j = tl.load(other + at_col + start, mask=inside[:, None], other=0.0)
        # The interpreter multiplies bf16 bit patterns.
        if UPCAST:
            x_i = x_i.to(tl.float32)
            g_i = g_i.to(tl.float32)
            x_j = x_j.to(tl.float32)
            other_j = other_j.to(tl.float32)
        # TF32 would round float32 operands.
        if OWN:
            s = tl.dot(x_i, x_j, s, input_precision="ieee")
        p = tl.dot(g_i, x_j, p, input_precision="ieee")
        q = tl.dot(x_i, other_j, q, input_precision="ieee")
    return p, q, s


@triton.jit
def softmax_weight(s, own, temperature, log_sum, LOG2E: tl.constexpr):
    """``exp((s - own) / temperature - log_sum)``, clamped to 1, which rounding could exceed."""
    return tl.exp2(tl.minimum(((s - own) / temperature - log_sum) * LOG2E, 0.0))


@triton.jit(
    do_not_specialize=["first", "first_column", "n", "m", "blocks", "splits"],
    do_not_specialize_on_alignment=["inv_norm", "own", "temperature", "log_sum", "factor"],
)
def symmetric_block(
    x,
    g,
    similarities,
    row_values,
    column_values,
    inv_norm,
    own,
    temperature,
    log_sum,
    centre,
    factor,
    weights,
    weights_back,
    slopes,
    row_sums,
    column_sums,
    alpha,
    stride,
    first,
    first_column,
    n,
    m,
    channels,
    blocks,
    splits,
    LIBRARY: tl.constexpr,
    DIAGONAL: tl.constexpr,
    LOG2E: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A tile of ``alpha W_ij``, ``alpha W_ji`` and ``H_ij + H_ji`` for the ``n`` pixels from ``first`` and
    the ``m`` pixels from ``first_column``; with ``DIAGONAL`` these are the same."""
    block, split, rows, i, j = panel_tile(n, m, blocks, splits, GROUP, BM, BN)
    i += first
    if not LIBRARY:
        j += first_column
        # each [BM, BN]
        p, q, s = gradient_products(x, g, g, i, j, channels, True, BM, BN, BK, EVEN, UPCAST)
        s_strips = quarters(s, BM, BN)  # four of [BM, BN // 4]
        p_strips = quarters(p, BM, BN)
        q_strips = quarters(q, BM, BN)
    # The pixels of both axes belong to the same image, so every vector is read by row and by column.
    inv_i = tl.load(inv_norm + i)[:, None]  # [BM, 1]
    own_i = tl.load(own + i)[:, None]
    t_i = tl.load(temperature + i)[:, None]
    log_sum_i = tl.load(log_sum + i)[:, None]
    centre_i = tl.load(centre + i)[:, None]
    factor_i = tl.load(factor + i)[:, None]
    along_i = tl.zeros((BM,), tl.float32)  # [BM]
    STRIPS: tl.constexpr = 1 if LIBRARY else 4
    WIDTH: tl.constexpr = BN // STRIPS
    # The epilogue works on four strips of columns; for a whole tile its vectors would spill.
    for strip in tl.static_range(STRIPS):
        cols = split * BN + strip * WIDTH + tl.arange(0, WIDTH)  # [WIDTH]
        j = first_column + tl.minimum(cols, m - 1)  # [WIDTH]
        # The scratch is square and a multiple of the tile, so accesses need no mask and are 16 bytes wide.
        to = rows.to(tl.int64)[:, None] * stride + cols[None, :]  # [BM, WIDTH]
        if LIBRARY:
            s = tl.load(similarities + to)  # [BM, WIDTH]
            p = tl.load(row_values + to)
            if DIAGONAL:  # the block is its own transpose
                q = tl.trans(tl.load(row_values + cols.to(tl.int64)[:, None] * stride + rows[None, :]))
            else:
                q = tl.load(column_values + to)
        else:
            s, p, q = s_strips[strip], p_strips[strip], q_strips[strip]  # each [BM, WIDTH]
        inv_j = tl.load(inv_norm + j)[None, :]  # [1, WIDTH]
        own_j = tl.load(own + j)[None, :]
        # A pixel's similarity to itself is set exactly: it is the row's maximum, the base of the weights.
        cosine = tl.where(i[:, None] == j[None, :], own_i, s * inv_i * inv_j)  # [BM, WIDTH]
        # One similarity gives both weights, since s_ij is s_ji.
        forth = softmax_weight(cosine, own_i, t_i, log_sum_i, LOG2E)  # [BM, WIDTH] W_ij
        t_j = tl.load(temperature + j)[None, :]
        back = softmax_weight(cosine, own_j, t_j, tl.load(log_sum + j)[None, :], LOG2E)  # [BM, WIDTH] W_ji
        # H_ij and H_ji are added in float32 and rounded once; each factor includes an inverse norm.
        h = forth * (p - centre_i) * factor_i * inv_j  # [BM, WIDTH]
        h += back * (q - tl.load(centre + j)[None, :]) * tl.load(factor + j)[None, :] * inv_i
        h = narrow(saturate(h, slopes), slopes, UPCAST)
        tl.store(slopes + to, h)
        tl.store(weights_back + to, narrow(alpha * back, weights_back, UPCAST))
        # The component of the slopes along a pixel's own feature is subtracted at the end. It is computed
        # from the rounded slopes, so that it cancels completely.
        part = tl.where((rows < n)[:, None] & (cols < m)[None, :], h.to(tl.float32) * s, 0.0)  # [BM, WIDTH]
        along_i += tl.sum(part, 1)
        if not DIAGONAL:
            tl.store(weights + to, narrow(alpha * forth, weights, UPCAST))
            tl.store(column_sums + block.to(tl.int64) * stride + cols, tl.sum(part, 0))
    # Each tile writes its own sums; torch adds them in a fixed order.
    tl.store(row_sums + split.to(tl.int64) * stride + rows, along_i)
