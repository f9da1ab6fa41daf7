"""The aggregation's gradient through the cosine, by pairs of blocks of pixels. Each pair is processed once.

If ``H`` is the gradient of the products, an image against itself needs ``(H + H^T) x`` and ``W^T g``. Since
``s_ij`` is ``s_ji``, the products ``x_i . x_j``, ``g_i . x_j`` and ``x_i . g_j`` of two blocks give both
weights and both slopes: three and a half products of the image with itself instead of five. Blocks are as
large as the memory of the panels allows, so that the float32 sum is read and written once per pair of blocks,
not once per panel of rows.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels import _panels
from fastuda.kernels._aggregate_block import symmetric_block
from fastuda.kernels._common import (
    INTERPRETED,
    LOG2E,
    Side,
    add_product,
    divides,
    narrow,
    product,
    tile_shape,
)

UNIT = 128
"""The size of a block in pixels is a multiple of this; the size of every tile divides it."""


class Blocks:
    """Scratch for a pair of blocks: the products if the library multiplies, both weights, the slopes, and
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
        # Tiles at the edge read past the products and ignore the values, which must only be numbers.
        self.products = x.new_zeros(3 * library, self.size, self.size, dtype=torch.float32)
        tiles = self.size // min(self.shape["BM"], self.shape["BN"])
        self.sums = x.new_empty(2, tiles, self.size, dtype=torch.float32)

    def most(self, x: Tensor) -> int:
        """Largest number of pixels of a block. Products get as much memory as panels, see :class:`Panel`."""
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

    ``centre`` [N] is the weighted mean gradient of a row's weights. A slope is ``factor`` [N] times its
    weight and the inverse norm of its column. If ``scale`` ([] float32) is given, ``grad`` and ``centre`` are
    that many times too large."""
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
    """``alpha W_ij``, ``alpha W_ji`` and ``H_ij + H_ji`` [I, J] of two blocks, and the sums of the slopes
    along the features of the rows [tiles, I] and of the columns [tiles, J]."""
    rows, columns, shape = part.stop - part.start, other.stop - other.start, scratch.shape
    products = scratch.memory  # any address will do: with tiles, the kernel does not read it
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
    """``(total - x along / |x|^2 + rest g) / scale``: the gradient through the normalisation, plus the direct
    part of the pixel itself."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    c = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    ok = row < rows  # [BR]
    inside = ok[:, None] & (c < channels)[None, :]  # [BR, BC]
    at = row[:, None] * channels + c[None, :]  # [BR, BC]
    inv = tl.load(inv_norm + row, mask=ok, other=0.0)[:, None]  # [BR, 1]
    dot = tl.load(along + row, mask=ok, other=0.0)[:, None]
    # The inverse norms are applied one by one, because their square may overflow.
    u = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * inv  # [BR, BC]
    value = tl.load(total + at, mask=inside, other=0.0) - u * (dot * inv)  # [BR, BC]
    value += rest * tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        value = value / tl.load(scale)
    tl.store(out + at, narrow(value, out, UPCAST), mask=inside)
