"""Sums over the pairs of pixels of narrow features, without a panel: the KL level, whose products are a few
classes wide.

A program owns a block of rows (or of columns) and walks over the others: it makes the tile of similarities
again, and adds its product with the other side's features to sums that stay in registers. Spans of the walk
are programs of their own, whose partial sums torch adds in a fixed order. Rows of an ``N x N`` array, at 19
classes 400 times as wide as the features, are never written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._common import INTERPRETED, LOG2E, padded_classes

WIDEST = 64
"""Most channels; their sums and the operands of a tile are in registers."""

PROGRAMS = 1024
"""Programs to aim for."""


class Walk:
    """How the programs of ``owned`` rows or columns share a walk over ``others``."""

    def __init__(self, owned: int, others: int, channels: int) -> None:
        self.block = 64 if INTERPRETED else 32
        tile = 128 if INTERPRETED else 32
        self.blocks, tiles = triton.cdiv(owned, self.block), triton.cdiv(others, tile)
        splits = max(1, min(tiles, PROGRAMS // self.blocks))
        self.span = triton.cdiv(tiles, splits) * tile
        self.splits = triton.cdiv(others, self.span)
        self.grid = (self.blocks, self.splits)
        width = padded_classes(channels)
        self.shape = dict(CP=width, BO=self.block, BT=tile, num_warps=4 if width <= 32 else 8, num_stages=2)

    def sums(self, like: Tensor, owned: int, *width: int) -> Tensor:
        """[splits, owned, ...] float32 for partial sums."""
        return like.new_empty(self.splits, owned, *width, dtype=torch.float32)


def hop_gradient(
    query: Tensor, key: Tensor, entropy: Tensor, residuals: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """``(H key, H^T query)`` with ``H_ij = w_i (softmax_ij - [j = match_i])`` over ``query . key + entropy``.

    Args:
        query: [N, C] float32.
        key: [M, C] float32.
        entropy: [N].
        residuals: per query ``w``, ``log2(e) / temperature``, log-sum-exp in base 2, and the match.
    """
    (n, c), m = query.shape, key.shape[0]
    sums = []
    for owned, others, columns in ((n, m, False), (m, n, True)):
        walk = Walk(owned, others, c)
        part = walk.sums(query, owned, c)
        hop_sums[walk.grid](
            query, key, entropy, *residuals, part, n, m, c, walk.span, COLUMNS=columns, **walk.shape
        )
        sums.append(part.sum(0))
    return sums[0], sums[1]


def mixed(values: Tensor, key: Tensor, entropy: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """``(sum_j e_ij values_j, sum_j e_ij)`` with ``e_ij = exp(s_ij / t_i)`` and ``s_ii = 0``, where
    ``s = values . key + entropy``: the largest of a row is the pixel's own."""
    n, c = values.shape
    walk = Walk(n, n, c)
    total, part = walk.sums(values, n), walk.sums(values, n, c)
    mixed_sums[walk.grid](
        values, key, entropy, temperature, part, total, n, c, walk.span, LOG2E=LOG2E, **walk.shape
    )
    return part.sum(0), total.sum(0)


def mixed_gradient(
    values: Tensor,
    key: Tensor,
    entropy: Tensor,
    temperature: Tensor,
    log_sum: Tensor,
    grad: Tensor,
    centre: Tensor,
    factor: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(H key, H^T values, W^T grad)`` of the weights ``W`` of :func:`mixed`, normalised, and of
    ``H_ij = factor_i W_ij (grad_i . values_j - sum_j W_ij grad_i . values_j)``.

    ``centre`` [N] is an estimate of that sum: its error is summed on the way and taken off at the end, since
    the key's logarithms would magnify the rounding of a difference of large sums.
    """
    n, c = values.shape
    walk = Walk(n, n, c)
    vectors = entropy, temperature, log_sum
    part, plain, error = walk.sums(values, n, c), walk.sums(values, n, c), walk.sums(values, n)
    mixed_row_sums[walk.grid](
        *(values, key, grad, *vectors, centre, part, plain, error, n, c, walk.span), LOG2E=LOG2E, **walk.shape
    )
    off = error.sum(0)
    by_query = (part.sum(0) - off[:, None] * plain.sum(0)) * factor[:, None]
    by_key, by_values = walk.sums(values, n, c), walk.sums(values, n, c)
    mixed_column_sums[walk.grid](
        *(values, key, grad, *vectors, centre + off, factor, by_key, by_values, n, c, walk.span),
        LOG2E=LOG2E,
        **walk.shape,
    )
    return by_query, by_key.sum(0), by_values.sum(0)


@triton.jit
def feature_rows(x, rows, n, channels, CP: tl.constexpr):
    """[rows, CP] of features, 0 outside."""
    # Channels are padded with zeros, which add nothing to a product; CP is a width that tl.dot takes.
    c = tl.arange(0, CP)  # [CP]
    at = rows.to(tl.int64)[:, None] * channels + c[None, :]  # [rows, CP]
    return tl.load(x + at, mask=(rows < n)[:, None] & (c < channels)[None, :], other=0.0)


@triton.jit
def store_sums(to, value, rows, n, channels, CP: tl.constexpr):
    """Write partial sums [rows, CP] of the program's span."""
    # A span writes sums of its own, which torch adds in a fixed order; padding is left out.
    c = tl.arange(0, CP)  # [CP]
    at = (tl.program_id(1).to(tl.int64) * n + rows)[:, None] * channels + c[None, :]  # [rows, CP]
    tl.store(to + at, value, mask=(rows < n)[:, None] & (c < channels)[None, :])


@triton.jit(do_not_specialize=["span"])
def hop_sums(
    query,
    key,
    entropy,
    weight,
    inv,
    lse,
    match,
    out,
    n,
    m,
    channels,
    span,
    COLUMNS: tl.constexpr,
    CP: tl.constexpr,
    BO: tl.constexpr,
    BT: tl.constexpr,
):
    """``H key`` of a block of rows, or with ``COLUMNS`` ``H^T query`` of a block of columns, over the
    program's span of the others."""
    # The block's features are loaded once and stay for the whole walk.
    own = tl.program_id(0) * BO + tl.arange(0, BO)  # [BO]
    if COLUMNS:
        mine = feature_rows(key, own, m, channels, CP)  # [BO, CP]
        owned, others = m, n
    else:
        mine = feature_rows(query, own, n, channels, CP)  # [BO, CP]
        owned, others = n, m
    # The sum stays in registers: the features are narrow enough for that.
    total = tl.zeros((BO, CP), tl.float32)  # [BO, CP]
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, others), BT):
        there = start + tl.arange(0, BT)  # [BT]
        if COLUMNS:
            other = feature_rows(query, there, n, channels, CP)  # [BT, CP]
            rows, cols = there, own  # [BT], [BO]
        else:
            other = feature_rows(key, there, m, channels, CP)  # [BT, CP]
            rows, cols = own, there  # [BO], [BT]
        # Residuals are the rows', which COLUMNS walks over: they are loaded again for every tile.
        row_ok = rows < n  # [BT] with COLUMNS, else [BO]
        w = tl.load(weight + rows, mask=row_ok, other=0.0)  # as row_ok
        scale = tl.load(inv + rows, mask=row_ok, other=0.0)  # as row_ok
        less = tl.load(lse + rows, mask=row_ok, other=0.0)  # as row_ok
        extra = tl.load(entropy + rows, mask=row_ok, other=0.0)  # as row_ok
        best = tl.load(match + rows, mask=row_ok, other=-1)  # as row_ok
        # Similarities are made again, in full float32, since TF32 would round the logarithms.
        s = tl.dot(mine, tl.trans(other), input_precision="ieee")  # [BO, BT]
        # A probability is held at 1: rounding at a vanishing temperature must not make it infinite.
        if COLUMNS:
            p = tl.exp2(tl.minimum((s + extra[None, :]) * scale[None, :] - less[None, :], 0.0))  # [BO, BT]
            h = w[None, :] * tl.where(best[None, :] == cols[:, None], p - 1.0, p)  # [BO, BT]
        else:
            p = tl.exp2(tl.minimum((s + extra[:, None]) * scale[:, None] - less[:, None], 0.0))  # [BO, BT]
            h = w[:, None] * tl.where(best[:, None] == cols[None, :], p - 1.0, p)  # [BO, BT]
        # What lies past the end has no part in the sum.
        h = tl.where((there < others)[None, :], h, 0.0)
        total = tl.dot(h, other, total, input_precision="ieee")
    store_sums(out, total, own, owned, channels, CP)


@triton.jit
def own_weights(s, rows, cols, entropy, temperature, log_sum, most, LOG2E: tl.constexpr):
    """``exp(s / t - log_sum)`` of products ``s`` (row vectors are given in the tile's shape), at most
    ``exp2(most)``; the pixel's own similarity is 0."""
    # The pixel's own similarity is put in exactly: it is the row's maximum, to which weights relate.
    s = tl.where(rows == cols, 0.0, s + entropy)  # [BO, BT]
    return tl.exp2(tl.minimum(s * (LOG2E / temperature) - log_sum * LOG2E, most))


@triton.jit(do_not_specialize=["span"])
def mixed_sums(
    values,
    key,
    entropy,
    temperature,
    out,
    out_total,
    n,
    channels,
    span,
    LOG2E: tl.constexpr,
    CP: tl.constexpr,
    BO: tl.constexpr,
    BT: tl.constexpr,
):
    """Weighted values and sums of weights of a block of rows."""
    # The block's features and vectors are loaded once and stay for the whole walk.
    rows = tl.program_id(0) * BO + tl.arange(0, BO)  # [BO]
    row_ok = rows < n  # [BO]
    mine = feature_rows(values, rows, n, channels, CP)  # [BO, CP]
    extra = tl.load(entropy + rows, mask=row_ok, other=0.0)[:, None]  # [BO, 1]
    t = tl.load(temperature + rows, mask=row_ok, other=1.0)[:, None]  # [BO, 1]
    # Weights and weighted values are summed on one walk: their quotient is taken after it.
    total = tl.zeros((BO,), tl.float32)  # [BO]
    acc = tl.zeros((BO, CP), tl.float32)  # [BO, CP]
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, n), BT):
        cols = start + tl.arange(0, BT)  # [BT]
        # [BO, BT]
        s = tl.dot(mine, tl.trans(feature_rows(key, cols, n, channels, CP)), input_precision="ieee")
        # at a vanishing temperature rounding must not lift a weight to infinity
        e = own_weights(s, rows[:, None], cols[None, :], extra, t, 0.0, 100.0, LOG2E)  # [BO, BT]
        # Columns past the end would count in the sum of weights.
        e = tl.where((cols < n)[None, :], e, 0.0)
        total += tl.sum(e, 1)
        acc = tl.dot(e, feature_rows(values, cols, n, channels, CP), acc, input_precision="ieee")
    store_sums(out, acc, rows, n, channels, CP)
    tl.store(out_total + tl.program_id(1).to(tl.int64) * n + rows, total, mask=row_ok)


@triton.jit(do_not_specialize=["span"])
def mixed_row_sums(
    values,
    key,
    grad,
    entropy,
    temperature,
    log_sum,
    centre,
    out,
    out_plain,
    out_error,
    n,
    channels,
    span,
    LOG2E: tl.constexpr,
    CP: tl.constexpr,
    BO: tl.constexpr,
    BT: tl.constexpr,
):
    """Of a block of rows: ``sum_j W_ij (d_ij - centre_i) key_j``, ``sum_j W_ij key_j`` and
    ``sum_j W_ij (d_ij - centre_i)`` with ``d_ij = grad_i . values_j``."""
    # The block's features, gradients and vectors are loaded once and stay for the whole walk.
    rows = tl.program_id(0) * BO + tl.arange(0, BO)  # [BO]
    row_ok = rows < n  # [BO]
    mine = feature_rows(values, rows, n, channels, CP)  # [BO, CP]
    g = feature_rows(grad, rows, n, channels, CP)  # [BO, CP]
    extra = tl.load(entropy + rows, mask=row_ok, other=0.0)[:, None]  # [BO, 1]
    t = tl.load(temperature + rows, mask=row_ok, other=1.0)[:, None]  # [BO, 1]
    less = tl.load(log_sum + rows, mask=row_ok, other=0.0)[:, None]  # [BO, 1]
    middle = tl.load(centre + rows, mask=row_ok, other=0.0)[:, None]  # [BO, 1]
    # The centre is an estimate: its error is summed beside, and what it costs is taken off after the walk.
    acc = tl.zeros((BO, CP), tl.float32)  # [BO, CP]
    plain = tl.zeros((BO, CP), tl.float32)  # [BO, CP]
    error = tl.zeros((BO,), tl.float32)  # [BO]
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, n), BT):
        cols = start + tl.arange(0, BT)  # [BT]
        k = feature_rows(key, cols, n, channels, CP)  # [BT, CP]
        # Full float32 and a centred d keep small what the key's logarithms would magnify.
        s = tl.dot(mine, tl.trans(k), input_precision="ieee")  # [BO, BT]
        # [BO, BT]
        d = tl.dot(g, tl.trans(feature_rows(values, cols, n, channels, CP)), input_precision="ieee") - middle
        w = own_weights(s, rows[:, None], cols[None, :], extra, t, less, 0.0, LOG2E)  # [BO, BT]
        # Columns past the end would count in the error.
        w = tl.where((cols < n)[None, :], w, 0.0)
        error += tl.sum(w * d, 1)
        acc = tl.dot(w * d, k, acc, input_precision="ieee")
        plain = tl.dot(w, k, plain, input_precision="ieee")
    store_sums(out, acc, rows, n, channels, CP)
    store_sums(out_plain, plain, rows, n, channels, CP)
    tl.store(out_error + tl.program_id(1).to(tl.int64) * n + rows, error, mask=row_ok)


@triton.jit(do_not_specialize=["span"])
def mixed_column_sums(
    values,
    key,
    grad,
    entropy,
    temperature,
    log_sum,
    centre,
    factor,
    out,
    out_values,
    n,
    channels,
    span,
    LOG2E: tl.constexpr,
    CP: tl.constexpr,
    BO: tl.constexpr,
    BT: tl.constexpr,
):
    """Of a block of columns: ``sum_i H_ij values_i`` and ``sum_i W_ij grad_i``."""
    # The block's features are loaded once and stay for the whole walk.
    cols = tl.program_id(0) * BO + tl.arange(0, BO)  # [BO]
    k = feature_rows(key, cols, n, channels, CP)  # [BO, CP]
    v = feature_rows(values, cols, n, channels, CP)  # [BO, CP]
    # Both sums use the same weights: one walk makes them once.
    acc = tl.zeros((BO, CP), tl.float32)  # [BO, CP]
    acc_values = tl.zeros((BO, CP), tl.float32)  # [BO, CP]
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, n), BT):
        # Vectors are the rows', which are walked over: they are loaded again for every tile.
        rows = start + tl.arange(0, BT)  # [BT]
        row_ok = rows < n  # [BT]
        q = feature_rows(values, rows, n, channels, CP)  # [BT, CP]
        g = feature_rows(grad, rows, n, channels, CP)  # [BT, CP]
        extra = tl.load(entropy + rows, mask=row_ok, other=0.0)[None, :]  # [1, BT]
        t = tl.load(temperature + rows, mask=row_ok, other=1.0)[None, :]  # [1, BT]
        less = tl.load(log_sum + rows, mask=row_ok, other=0.0)[None, :]  # [1, BT]
        middle = tl.load(centre + rows, mask=row_ok, other=0.0)[None, :]  # [1, BT]
        step = tl.load(factor + rows, mask=row_ok, other=0.0)[None, :]  # [1, BT]
        # The tile is made turned round, so that its product with the rows is the columns' sum.
        s = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BO, BT]
        d = tl.dot(v, tl.trans(g), input_precision="ieee") - middle  # [BO, BT]
        w = own_weights(s, rows[None, :], cols[:, None], extra, t, less, 0.0, LOG2E)  # [BO, BT]
        # Rows past the end have no part in the sums.
        w = tl.where(row_ok[None, :], w, 0.0)
        acc = tl.dot(w * d * step, q, acc, input_precision="ieee")
        acc_values = tl.dot(w, g, acc_values, input_precision="ieee")
    store_sums(out, acc, cols, n, channels, CP)
    store_sums(out_values, acc_values, cols, n, channels, CP)
