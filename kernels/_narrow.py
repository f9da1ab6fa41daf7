"""Sums over pairs of pixels with narrow features, without a panel. KL uses them, whose products are only a
few classes wide.

A program owns a block of rows (or of columns) and walks over the other side. For each tile it recomputes the
similarities, and adds their product with the other side's features to sums that stay in registers. The walk
is split into spans with a program each; torch adds their partial sums in a fixed order. Rows of an ``N x N``
array, which at 19 classes are 400 times as wide as the features, are never written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._common import INTERPRETED, padded_classes

WIDEST = 64
"""Largest number of channels; their sums and the operands of a tile are in registers."""

PROGRAMS = 1024
"""Number of programs to aim for."""


class Walk:
    """The split of a walk over ``others`` among the programs of ``owned`` rows or columns."""

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
        residuals: for each query ``w``, ``log2(e) / temperature``, log-sum-exp in base 2, and the match.
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


@triton.jit
def feature_rows(x, rows, n, channels, CP: tl.constexpr):
    """[rows, CP] of features, 0 outside."""
    # Channels are padded with zeros, which add nothing to a product, to CP, a width that tl.dot accepts.
    c = tl.arange(0, CP)  # [CP]
    at = rows.to(tl.int64)[:, None] * channels + c[None, :]  # [rows, CP]
    return tl.load(x + at, mask=(rows < n)[:, None] & (c < channels)[None, :], other=0.0)


@triton.jit
def store_sums(to, value, rows, n, channels, CP: tl.constexpr):
    """Write partial sums [rows, CP] of the program's span."""
    # Each span writes its own sums, which torch adds in a fixed order; padding is left out.
    c = tl.arange(0, CP)  # [CP]
    at = (tl.program_id(1).to(tl.int64) * n + rows)[:, None] * channels + c[None, :]  # [rows, CP]
    tl.store(to + at, value, mask=(rows < n)[:, None] & (c < channels)[None, :])


@triton.jit(
    do_not_specialize=["n", "m", "span"],
    do_not_specialize_on_alignment=["query", "key", "entropy"],
)
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
    program's span of the other side."""
    # The block's features are loaded once and stay for the whole walk.
    own = tl.program_id(0) * BO + tl.arange(0, BO)  # [BO]
    if COLUMNS:
        mine = feature_rows(key, own, m, channels, CP)  # [BO, CP]
        owned, others = m, n
    else:
        mine = feature_rows(query, own, n, channels, CP)  # [BO, CP]
        owned, others = n, m
    # The features are narrow enough for the sum to stay in registers.
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
        # Residuals belong to rows. With COLUMNS the walk goes over rows, so they are loaded for every tile.
        row_ok = rows < n  # [BT] with COLUMNS, else [BO]
        w = tl.load(weight + rows, mask=row_ok, other=0.0)  # as row_ok
        scale = tl.load(inv + rows, mask=row_ok, other=0.0)  # as row_ok
        less = tl.load(lse + rows, mask=row_ok, other=0.0)  # as row_ok
        extra = tl.load(entropy + rows, mask=row_ok, other=0.0)  # as row_ok
        best = tl.load(match + rows, mask=row_ok, other=-1)  # as row_ok
        # Similarities are recomputed in full float32, because TF32 would round the logarithms.
        s = tl.dot(mine, tl.trans(other), input_precision="ieee")  # [BO, BT]
        # A probability is clamped to 1: at a vanishing temperature, rounding could make it infinite.
        if COLUMNS:
            p = tl.exp2(tl.minimum((s + extra[None, :]) * scale[None, :] - less[None, :], 0.0))  # [BO, BT]
            h = w[None, :] * tl.where(best[None, :] == cols[:, None], p - 1.0, p)  # [BO, BT]
        else:
            p = tl.exp2(tl.minimum((s + extra[:, None]) * scale[:, None] - less[:, None], 0.0))  # [BO, BT]
            h = w[:, None] * tl.where(best[:, None] == cols[None, :], p - 1.0, p)  # [BO, BT]
        # Rows and columns past the end must not count in the sum.
        h = tl.where((there < others)[None, :], h, 0.0)
        total = tl.dot(h, other, total, input_precision="ieee")
    store_sums(out, total, own, owned, channels, CP)
