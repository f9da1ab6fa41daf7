"""The aggregation's gradient through the cosine, by pairs of blocks of pixels: each pair is worked on once.

With ``H`` the gradient of the products, an image against itself needs ``(H + H^T) x`` and ``W^T g``. Since
``s_ij`` is ``s_ji``, the products ``x_i . x_j``, ``g_i . x_j`` and ``x_i . g_j`` of two blocks give both
weights and both slopes: three and a half products of the image with itself in place of five. Blocks are as
large as the panels' memory allows, so that the one sum in float32 is read and written once per pair, not once
per panel of rows.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels import _panels
from fastuda.kernels._common import (
    INTERPRETED,
    LOG2E,
    Side,
    add_product,
    divides,
    grouped,
    narrow,
    product,
    quarters,
    tile_shape,
)
from fastuda.kernels._panels import saturate

UNIT = 128
"""Pixels that the size of a block is a multiple of, and every tile's divides."""


class Blocks:
    """Scratch of a pair of blocks: the products where the library multiplies, both weights, the slopes, and
    partial sums."""

    def __init__(self, x: Tensor, library: bool) -> None:
        n = len(x)
        self.library = library
        self.shape = dict(BM=64, BN=128 if INTERPRETED else 32, num_warps=4)
        if not library:
            self.shape = tile_shape(x)
            self.shape |= {side: min(self.shape[side], UNIT) for side in ("BM", "BN")}
            if not INTERPRETED:  # registers hold three accumulators
                self.shape |= dict(BM=64 if x.dtype == torch.float32 else 128, BN=64)
        count = triton.cdiv(n, self.most(x))
        self.size = triton.cdiv(triton.cdiv(n, count), UNIT) * UNIT
        self.memory = x.new_empty(3, self.size, self.size)
        # Tiles at the edge read past the products, and use nothing of it: it has to be some number.
        self.products = x.new_zeros(3 * library, self.size, self.size, dtype=torch.float32)
        tiles = self.size // min(self.shape["BM"], self.shape["BN"])
        self.sums = x.new_empty(2, tiles, self.size, dtype=torch.float32)

    def most(self, x: Tensor) -> int:
        """Pixels of a block, at most: as much again for products as for panels, as in :class:`Panel`."""
        pair_bytes = 3 * x.element_size() + 12 * self.library
        side = math.isqrt((1 + self.library) * _panels.PANEL_BYTES // pair_bytes)
        return max(side // UNIT * UNIT, UNIT)

    def parts(self, n: int) -> list[slice]:
        """The blocks of ``n`` pixels."""
        return [slice(start, min(start + self.size, n)) for start in range(0, n, self.size)]


def symmetric_gradient(
    side: Side,
    b: int,
    own: Tensor,
    temperature: Tensor,
    log_sum: Tensor,
    centre: Tensor,
    factor: Tensor,
    grad: Tensor,
    alpha: float,
    scale: Tensor | None,
    library: bool,
    out: Tensor,
) -> None:
    """The input's gradient of image ``b`` into ``out`` [N, C].

    ``centre`` [N] is the mean gradient of a row's weights under the weights, ``factor`` [N] what a slope is
    times its weight and the inverse norm of its column. ``grad`` and ``centre`` are ``scale`` times too large
    where that is given ([] float32)."""
    x = side.query[b]
    n, c = x.shape
    vectors = side.row[b], own, temperature, log_sum, centre, factor
    scratch = Blocks(x, library)
    total = torch.zeros(n, c, dtype=torch.float32, device=x.device)
    along = torch.zeros(n, dtype=torch.float32, device=x.device)
    parts = scratch.parts(n)
    for number, part in enumerate(parts):
        for other in parts[number:]:
            forth, back, slopes, by_row, by_column = _fill(scratch, x, grad, part, other, vectors, alpha)
            add_product(total[part], back, grad[other])
            add_product(total[part], slopes, x[other])
            along[part] += by_row.sum(0)
            if other != part:
                add_product(total[other], forth.T, grad[part])
                add_product(total[other], slopes.T, x[part])
                along[other] += by_column.sum(0)
    width = min(triton.next_power_of_2(c), 2048)
    height = 64 if INTERPRETED else 2048 // width
    finish_rows[(triton.cdiv(n, height), triton.cdiv(c, width))](
        total,
        along,
        x,
        side.row[b],
        grad,
        total if scale is None else scale,
        out,
        1 - alpha,
        n,
        c,
        SCALED=scale is not None,
        UPCAST=INTERPRETED,
        BR=height,
        BC=width,
        num_warps=4,
    )


def _fill(
    scratch: Blocks,
    x: Tensor,
    grad: Tensor,
    part: slice,
    other: slice,
    vectors: tuple[Tensor, ...],
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``alpha W_ij``, ``alpha W_ji`` and ``H_ij + H_ji`` [I, J] of two blocks, and what the slopes add up
    to along the features of the rows [tiles, I] and of the columns [tiles, J]."""
    rows, columns, shape = part.stop - part.start, other.stop - other.start, scratch.shape
    products = scratch.memory  # any address: tiles read no products
    if scratch.library:
        products = scratch.products
        product(x[part], x[other].T, products[0, :rows, :columns])
        product(grad[part], x[other].T, products[1, :rows, :columns])
        if other != part:
            product(x[part], grad[other].T, products[2, :rows, :columns])
    blocks, splits = triton.cdiv(rows, shape["BM"]), triton.cdiv(columns, shape["BN"])
    symmetric_block[(blocks * splits,)](
        x,
        grad,
        *products,
        *vectors,
        *scratch.memory,
        *scratch.sums,
        alpha,
        scratch.size,
        part.start,
        other.start,
        rows,
        columns,
        x.shape[1],
        blocks,
        splits,
        LIBRARY=scratch.library,
        DIAGONAL=other == part,
        LOG2E=LOG2E,
        EVEN=divides(x, shape.get("BK", 1)),
        UPCAST=INTERPRETED,
        GROUP=8,
        **shape if "BK" in shape else shape | dict(BK=1),
    )
    filled = (matrix[:rows, :columns] for matrix in scratch.memory)
    return *filled, scratch.sums[0, :splits, :rows], scratch.sums[1, :blocks, :columns]


@triton.jit
def softmax_weight(s, own, temperature, log_sum, LOG2E: tl.constexpr):
    """``exp((s - own) / temperature - log_sum)``, at most 1: rounding must not make more of it."""
    return tl.exp2(tl.minimum(((s - own) / temperature - log_sum) * LOG2E, 0.0))


@triton.jit
def three_products(
    x,
    g,
    rows,  # [BM]
    cols,  # [BN]
    channels,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``x_i . x_j``, ``g_i . x_j`` and ``x_i . g_j`` of a tile in one loop."""
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
            g_j = tl.load(g + at_col + start)  # [BK, BN]
        else:
            inside = k < channels - start  # [BK]
            x_i = tl.load(x + at_row + start, mask=inside[None, :], other=0.0)
            g_i = tl.load(g + at_row + start, mask=inside[None, :], other=0.0)
            x_j = tl.load(x + at_col + start, mask=inside[:, None], other=0.0)
            g_j = tl.load(g + at_col + start, mask=inside[:, None], other=0.0)
        # The interpreter multiplies bf16 bit patterns.
        if UPCAST:
            x_i = x_i.to(tl.float32)
            g_i = g_i.to(tl.float32)
            x_j = x_j.to(tl.float32)
            g_j = g_j.to(tl.float32)
        # TF32 would round float32 operands.
        s = tl.dot(x_i, x_j, s, input_precision="ieee")
        p = tl.dot(g_i, x_j, p, input_precision="ieee")
        q = tl.dot(x_i, g_j, q, input_precision="ieee")
    return s, p, q


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
    """A tile of ``alpha W_ij``, ``alpha W_ji`` and ``H_ij + H_ji`` of the ``n`` pixels from ``first`` and the
    ``m`` from ``first_column``; ``DIAGONAL``: they are the same."""
    # Programs that run together share operands, which then stay in L2.
    block, split = grouped(tl.program_id(0), blocks, splits, GROUP)
    # Rows and columns past the end read the last one, a valid address; what they give is masked.
    rows = block * BM + tl.arange(0, BM)  # [BM]
    i = first + tl.minimum(rows, n - 1).to(tl.int64)  # [BM]
    if not LIBRARY:
        j = first_column + tl.minimum(split * BN + tl.arange(0, BN), m - 1).to(tl.int64)  # [BN]
        # each [BM, BN]
        s, p, q = three_products(x, g, i, j, channels, BM, BN, BK, EVEN, UPCAST)
        s_strips = quarters(s, BM, BN)  # four of [BM, BN // 4]
        p_strips = quarters(p, BM, BN)
        q_strips = quarters(q, BM, BN)
    # The pixels of both axes are of one image: every vector is read by row and by column.
    inv_i = tl.load(inv_norm + i)[:, None]  # [BM, 1]
    own_i = tl.load(own + i)[:, None]
    t_i = tl.load(temperature + i)[:, None]
    log_sum_i = tl.load(log_sum + i)[:, None]
    centre_i = tl.load(centre + i)[:, None]
    factor_i = tl.load(factor + i)[:, None]
    along_i = tl.zeros((BM,), tl.float32)  # [BM]
    STRIPS: tl.constexpr = 1 if LIBRARY else 4
    WIDTH: tl.constexpr = BN // STRIPS
    # The epilogue of a tile takes four strips of columns: for the whole its vectors would spill.
    for strip in tl.static_range(STRIPS):
        cols = split * BN + strip * WIDTH + tl.arange(0, WIDTH)  # [WIDTH]
        j = first_column + tl.minimum(cols, m - 1)  # [WIDTH]
        # The scratch is square and tiles divide it: no access needs a mask, and all are 16 bytes wide.
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
        # The pixel's own similarity is put in exactly: it is the row's maximum, to which weights relate.
        cosine = tl.where(i[:, None] == j[None, :], own_i, s * inv_i * inv_j)  # [BM, WIDTH]
        # One similarity gives both weights, since s_ij is s_ji.
        forth = softmax_weight(cosine, own_i, t_i, log_sum_i, LOG2E)  # [BM, WIDTH] W_ij
        t_j = tl.load(temperature + j)[None, :]
        back = softmax_weight(cosine, own_j, t_j, tl.load(log_sum + j)[None, :], LOG2E)  # [BM, WIDTH] W_ji
        # H_ij and H_ji are added in float32 and rounded once; an inverse norm is in each factor.
        h = forth * (p - centre_i) * factor_i * inv_j  # [BM, WIDTH]
        h += back * (q - tl.load(centre + j)[None, :]) * tl.load(factor + j)[None, :] * inv_i
        h = narrow(saturate(h, slopes), slopes, UPCAST)
        tl.store(slopes + to, h)
        tl.store(weights_back + to, narrow(alpha * back, weights_back, UPCAST))
        # What the slopes add along a pixel's own feature comes off in the end: of the rounded slopes, so that
        # nothing of it is left.
        part = tl.where((rows < n)[:, None] & (cols < m)[None, :], h.to(tl.float32) * s, 0.0)  # [BM, WIDTH]
        along_i += tl.sum(part, 1)
        if not DIAGONAL:
            tl.store(weights + to, narrow(alpha * forth, weights, UPCAST))
            tl.store(column_sums + block.to(tl.int64) * stride + cols, tl.sum(part, 0))
    # A tile writes sums of its own: torch adds them in a fixed order.
    tl.store(row_sums + split.to(tl.int64) * stride + rows, along_i)


@triton.jit(do_not_specialize_on_alignment=["inv_norm"])
def finish_rows(
    total,
    along,
    x,
    inv_norm,
    g,
    scale,
    out,
    rest,
    rows,
    channels,
    SCALED: tl.constexpr,
    UPCAST: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """``(total - x along / |x|^2 + rest g) / scale``: the gradient of the normalisation, and the pixel's own
    share."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    c = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    ok = row < rows  # [BR]
    inside = ok[:, None] & (c < channels)[None, :]  # [BR, BC]
    at = row[:, None] * channels + c[None, :]  # [BR, BC]
    inv = tl.load(inv_norm + row, mask=ok, other=0.0)[:, None]  # [BR, 1]
    dot = tl.load(along + row, mask=ok, other=0.0)[:, None]
    # The inverse norms are applied one by one: their square may overflow.
    u = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * inv  # [BR, BC]
    value = tl.load(total + at, mask=inside, other=0.0) - u * (dot * inv)  # [BR, BC]
    value += rest * tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        value = value / tl.load(scale)
    tl.store(out + at, narrow(value, out, UPCAST), mask=inside)
