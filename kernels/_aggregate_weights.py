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
    narrow,
    panel_tile,
    product_strip,
    quarters,
    tile_product,
    tile_shape,
)


def own_similarity(side: Side, similarity: str) -> Tensor:
    """[B, N] similarity of every pixel to itself, the largest of its row: 1, or 0 for KL and for a vanishing
    feature."""
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
    """Write ``exp((s_ij - s_ii) / t_i)`` of the rows from ``start`` of image ``b`` into ``weights`` [R, N],
    and return its row sums [R]. Reads ``products`` [R, N] if the library has multiplied them."""
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
    """Similarities from a strip of products, with the exact similarity of a pixel to itself."""
    # Norms and entropies are applied after the product, in float32, so that its operands stay unrounded.
    if KL:
        s = s + scale[:, None]  # [BM, columns]
    else:
        scale_col = tl.load(row + cols, mask=cols < m, other=0.0)  # [columns]
        s = s * scale[:, None] * scale_col[None, :]  # [BM, columns]
    return tl.where(cols[None, :] == rows[:, None], top[:, None], s)


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
    """Rows ``first`` to ``first + n`` of ``m``: weights relative to the pixel's own, and their sums
    [splits, n]."""
    _, split, rows, at_row, at_col = panel_tile(n, m, blocks, splits, GROUP, BM, BN)
    at_row += first
    if not LIBRARY:
        s = tile_product(a, b, at_row, at_col, channels, BM, BN, BK, EVEN, UPCAST)  # [BM, BN]
        parts = quarters(s, BM, BN)  # four of [BM, BN // 4]
    scale = tl.load(row + at_row)  # [BM]
    # The pixel's similarity to itself is the row's maximum and known in advance: no pass has to find it.
    top = tl.load(own + at_row)  # [BM]
    inv = LOG2E / tl.load(temperature + at_row)  # [BM]
    total = tl.zeros((BM,), tl.float32)  # [BM]
    # The epilogue works on four strips of columns; for a whole tile its vectors would spill.
    for strip in tl.static_range(4):
        cols = split * BN + strip * (BN // 4) + tl.arange(0, BN // 4)  # [BN // 4]
        col_ok = cols < m  # [BN // 4]
        if LIBRARY:
            part = product_strip(products, rows, cols, n, m, stride)  # [BM, BN // 4]
        else:
            part = parts[strip]  # [BM, BN // 4]
        s = strip_similarity(part, first + rows, cols, scale, row, top, m, KL)  # [BM, BN // 4]
        # At a vanishing temperature, rounding could make a weight infinite.
        e = tl.exp2(tl.minimum((s - top[:, None]) * inv[:, None], 100.0 if KL else 0.0))  # [BM, BN // 4]
        e = tl.where(col_ok[None, :], e, 0.0)
        total += tl.sum(e, 1)
        # Zeros fill a row up to its stride, so that stores are 16 bytes wide.
        to = weights + rows.to(tl.int64)[:, None] * stride + cols[None, :]  # [BM, BN // 4]
        tl.store(to, narrow(e, weights, UPCAST), mask=(rows < n)[:, None] & (cols < stride)[None, :])
    # Each column split writes its own sums; torch adds them in a fixed order.
    tl.store(sums + split.to(tl.int64) * n + rows, total, mask=rows < n)
