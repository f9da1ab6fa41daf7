"""The panels of the aggregation's gradient: the weights again, and the slopes by the products."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._aggregate_weights import strip_similarity
from fastuda.kernels._common import (
    INTERPRETED,
    LOG2E,
    Side,
    divides,
    grouped,
    narrow,
    quarters,
    tile_shape,
)
from fastuda.kernels._panels import saturate


def fill_slopes(
    weights: Tensor,
    slopes: Tensor,
    side: Side,
    b: int,
    start: int,
    own: Tensor,
    temperature: Tensor,
    log_sum: Tensor,
    grad: Tensor,
    values: Tensor,
    centre: Tensor,
    factor: Tensor,
    similarity: str,
) -> None:
    """The softmax ``weights`` of the rows from ``start``, and ``slopes``, the gradient with respect to their
    products with the keys (raw features for the cosine: the inverse norms of the columns are in it, those of
    the rows and what scales the panel in ``factor``).

    ``centre`` [N] is the mean gradient of a row's weights under the weights. For KL an estimate does: it is
    corrected in a second step, since logarithms would magnify its rounding."""
    shape = tile_shape(weights)
    rows, n = weights.shape
    blocks, splits = triton.cdiv(rows, shape["BM"]), triton.cdiv(n, shape["BN"])
    kl = similarity == "kl"
    sums = own.new_empty(splits, rows) if kl else own  # any address: the cosine writes no sums
    slope_panel[(blocks * splits,)](
        side.query[b],
        side.key[b],
        grad,
        values,
        side.row[b],
        own[b],
        temperature[b],
        log_sum[b],
        centre,
        factor,
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
        KL=kl,
        LOG2E=LOG2E,
        EVEN=divides(side.query, shape["BK"]),
        UPCAST=INTERPRETED,
        GROUP=8,
        **shape,
    )
    if not kl:
        return
    height, width = (64, 256) if INTERPRETED else (1, 2048)
    centre_slopes[(triton.cdiv(rows, height), triton.cdiv(n, width))](
        weights,
        slopes,
        sums.sum(0),
        factor[start : start + rows],
        weights.stride(0),
        rows,
        UPCAST=INTERPRETED,
        BR=height,
        BC=width,
        num_warps=4,
    )


@triton.jit
def pair_product(
    a,
    b,
    g,
    v,
    rows,  # [BM]
    cols,  # [BN]
    channels,
    SAME: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``a[rows] @ b[cols].T`` and ``g[rows] @ v[cols].T`` in one loop; ``SAME``: ``b`` and ``v`` are one."""
    k = tl.arange(0, BK)  # [BK]
    # Two products share addresses and loop, and with SAME the right operand.
    at_row = rows[:, None] * channels + k[None, :]  # [BM, BK]
    at_col = cols[None, :] * channels + k[:, None]  # [BK, BN]
    s = tl.zeros((BM, BN), tl.float32)  # [BM, BN]
    d = tl.zeros((BM, BN), tl.float32)  # [BM, BN]
    for start in range(0, channels, BK):
        inside = k < channels - start  # [BK]
        if EVEN:
            x = tl.load(a + at_row + start)  # [BM, BK]
            y = tl.load(b + at_col + start)  # [BK, BN]
            h = tl.load(g + at_row + start)  # [BM, BK]
        else:
            x = tl.load(a + at_row + start, mask=inside[None, :], other=0.0)  # [BM, BK]
            y = tl.load(b + at_col + start, mask=inside[:, None], other=0.0)  # [BK, BN]
            h = tl.load(g + at_row + start, mask=inside[None, :], other=0.0)  # [BM, BK]
        if SAME:
            z = y  # [BK, BN]
        else:
            z = tl.load(v + at_col + start, mask=inside[:, None], other=0.0)  # [BK, BN]
        # The interpreter multiplies bf16 bit patterns.
        if UPCAST:
            x = x.to(tl.float32)
            y = y.to(tl.float32)
            h = h.to(tl.float32)
            z = z.to(tl.float32)
        # TF32 would round float32 operands.
        s = tl.dot(x, y, s, input_precision="ieee")
        d = tl.dot(h, z, d, input_precision="ieee")
    return s, d


@triton.jit(
    do_not_specialize=["first", "blocks", "splits"],
    do_not_specialize_on_alignment=["row", "own", "temperature", "log_sum", "factor"],
)
def slope_panel(
    a,
    b,
    g,
    v,
    row,
    own,
    temperature,
    log_sum,
    centre,
    factor,
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
    KL: tl.constexpr,
    LOG2E: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Weights and slopes; for KL the gradient of the weights less ``centre``, and partial sums of their
    product."""
    # Programs that run together share operands, which then stay in L2.
    block, split = grouped(tl.program_id(0), blocks, splits, GROUP)
    # Rows and columns past the end read the last one, a valid address; what they give is masked.
    rows = block * BM + tl.arange(0, BM)  # [BM]
    at_row = first + tl.minimum(rows, n - 1).to(tl.int64)  # [BM]
    at_col = tl.minimum(split * BN + tl.arange(0, BN), m - 1).to(tl.int64)  # [BN]
    # both [BM, BN]
    s, d = pair_product(a, b, g, v, at_row, at_col, channels, not KL, BM, BN, BK, EVEN, UPCAST)
    scale = tl.load(row + at_row)  # [BM]
    top = tl.load(own + at_row)  # [BM]
    inv = LOG2E / tl.load(temperature + at_row)  # [BM]
    norm = tl.load(log_sum + at_row) * LOG2E  # [BM]
    middle = tl.load(centre + at_row)  # [BM]
    step = tl.load(factor + at_row)  # [BM]
    # The epilogue takes four strips of columns: for whole tiles its vectors would spill.
    parts = quarters(s, BM, BN)  # four of [BM, BN // 4]
    d_parts = quarters(d, BM, BN)  # four of [BM, BN // 4]
    total = tl.zeros((BM,), tl.float32)  # [BM]
    for strip in tl.static_range(4):
        cols = split * BN + strip * (BN // 4) + tl.arange(0, BN // 4)  # [BN // 4]
        col_ok = cols < m  # [BN // 4]
        # [BM, BN // 4], [BN // 4]
        s, scale_col = strip_similarity(parts[strip], first + rows, cols, scale, row, top, m, KL)
        # A weight is held at 1: rounding at a vanishing temperature must not make it infinite.
        w = tl.exp2(tl.minimum((s - top[:, None]) * inv[:, None] - norm[:, None], 0.0))  # [BM, BN // 4]
        w = tl.where(col_ok[None, :], w, 0.0)
        d = d_parts[strip] - middle[:, None]  # [BM, BN // 4]
        # For KL the centre is an estimate: its error, summed here, comes off in centre_slopes.
        if KL:
            total += tl.sum(w * d, 1)
            d = tl.where(col_ok[None, :], d, 0.0)
        else:
            d = w * d * step[:, None] * scale_col[None, :]
        # Zeros fill a row up to its stride: stores are then 16 bytes wide.
        to = rows.to(tl.int64)[:, None] * stride + cols[None, :]  # [BM, BN // 4]
        mask = (rows < n)[:, None] & (cols < stride)[None, :]  # [BM, BN // 4]
        tl.store(weights + to, narrow(w, weights, UPCAST), mask=mask)
        tl.store(slopes + to, narrow(saturate(d, slopes), slopes, UPCAST), mask=mask)
    # A column split writes sums of its own: torch adds them in a fixed order.
    if KL:
        tl.store(sums + split.to(tl.int64) * n + rows, total, mask=rows < n)


@triton.jit(do_not_specialize_on_alignment=["factor"])
def centre_slopes(
    weights,
    slopes,
    mean,
    factor,
    stride,
    n,
    UPCAST: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """``slopes = weights (slopes - mean) factor``."""
    # A row's mean error is known only when its whole width is done: hence a kernel of its own.
    rows = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    cols = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    row_ok = rows < n  # [BR]
    mask = row_ok[:, None] & (cols < stride)[None, :]  # [BR, BC]: zeros stay zeros
    at = rows[:, None] * stride + cols[None, :]  # [BR, BC]
    w = tl.load(weights + at, mask=mask, other=0.0).to(tl.float32)  # [BR, BC]
    d = tl.load(slopes + at, mask=mask, other=0.0).to(tl.float32)  # [BR, BC]
    d = w * (d - tl.load(mean + rows, mask=row_ok, other=0.0)[:, None])
    d = d * tl.load(factor + rows, mask=row_ok, other=0.0)[:, None]
    tl.store(slopes + at, narrow(d, slopes, UPCAST), mask=mask)
