"""The panels of the aggregation: softmax weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._common import (
    INTERPRETED,
    LOG2E,
    Side,
    divides,
    grouped,
    narrow,
    product_strip,
    quarters,
    tile_product,
    tile_shape,
)


def own_similarity(side: Side, similarity: str) -> Tensor:
    """[B, N] similarity of every pixel to itself, the largest of its row: 1, or 0 for a vanishing feature or
    for KL."""
    if similarity == "kl":
        return torch.zeros_like(side.row)
    norm = torch.linalg.vector_norm(side.query, dim=-1, dtype=torch.float32)
    return (norm * side.row).square()


def fill_weights(
    weights: Tensor,
    side: Side,
    b: int,
    start: int,
    own: Tensor,
    temperature: Tensor,
    similarity: str,
    products: Tensor | None = None,
) -> Tensor:
    """``exp((s_ij - s_ii) / t_i)`` of the rows from ``start`` of image ``b`` into ``weights`` [R, N], and its
    row sums [R]; from ``products`` [R, N] where the library has multiplied them."""
    shape = tile_shape(weights)
    rows, n = weights.shape
    blocks, splits = triton.cdiv(rows, shape["BM"]), triton.cdiv(n, shape["BN"])
    sums = own.new_empty(splits, rows)
    weight_panel[(blocks * splits,)](
        side.query[b],
        side.key[b],
        side.row[b],
        own[b],
        temperature[b],
        weights,
        sums,
        weights if products is None else products,
        weights.stride(0),
        start,
        rows,
        n,
        side.query.shape[2],
        blocks,
        splits,
        KL=similarity == "kl",
        LIBRARY=products is not None,
        LOG2E=LOG2E,
        EVEN=divides(side.query, shape["BK"]),
        UPCAST=INTERPRETED,
        GROUP=8,
        **shape,
    )
    return sums.sum(0)


@triton.jit
def strip_similarity(s, rows, cols, scale, row, top, m, KL: tl.constexpr):
    """Similarities from a strip of products, the pixel's own exact, and the scales of its columns."""
    scale_col = tl.load(row + cols, mask=cols < m, other=0.0)
    if KL:
        s = s + scale[:, None]
    else:
        s = s * scale[:, None] * scale_col[None, :]
    return tl.where(cols[None, :] == rows[:, None], top[:, None], s), scale_col


@triton.jit(
    do_not_specialize=["first", "blocks", "splits"],
    do_not_specialize_on_alignment=["row", "own", "temperature"],
)
def weight_panel(
    a,
    b,
    row,
    own,
    temperature,
    weights,
    sums,
    products,
    stride,
    first,
    n,
    m,
    channels,
    blocks,
    splits,
    KL: tl.constexpr,
    LIBRARY: tl.constexpr,
    LOG2E: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Rows ``first`` to ``first + n`` of ``m``: weights relative to the pixel's own, and sums [splits, n]."""
    block, split = grouped(tl.program_id(0), blocks, splits, GROUP)
    rows = block * BM + tl.arange(0, BM)
    at_row = first + tl.minimum(rows, n - 1).to(tl.int64)
    if not LIBRARY:
        at_col = tl.minimum(split * BN + tl.arange(0, BN), m - 1).to(tl.int64)
        s = tile_product(a, b, at_row, at_col, channels, BM, BN, BK, EVEN, UPCAST)  # [BM, BN]
        parts = quarters(s, BM, BN)
    scale = tl.load(row + at_row)
    top = tl.load(own + at_row)
    inv = LOG2E / tl.load(temperature + at_row)
    total = tl.zeros((BM,), tl.float32)
    for strip in tl.static_range(4):
        cols = split * BN + strip * (BN // 4) + tl.arange(0, BN // 4)
        col_ok = cols < m
        if LIBRARY:
            part = product_strip(products, rows, cols, n, m, stride)
        else:
            part = parts[strip]
        s, _ = strip_similarity(part, first + rows, cols, scale, row, top, m, KL)
        # At a vanishing temperature rounding must not lift a weight to infinity.
        e = tl.exp2(tl.minimum((s - top[:, None]) * inv[:, None], 100.0 if KL else 0.0))
        e = tl.where(col_ok[None, :], e, 0.0)
        total += tl.sum(e, 1)
        to = weights + rows.to(tl.int64)[:, None] * stride + cols[None, :]
        tl.store(to, narrow(e, weights, UPCAST), mask=(rows < n)[:, None] & (cols < stride)[None, :])
    tl.store(sums + split.to(tl.int64) * n + rows, total, mask=rows < n)
