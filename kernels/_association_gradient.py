"""The association's backward, in row panels.

Let ``H`` be the gradient of the products of raw features, with weights, temperatures and both inverse norms
folded in. The gradients are ``H t`` and ``H^T s``; each is then projected onto the complement of its own
feature. Rows and columns without a match are not skipped: only the device knows how many there are, and
reading that number would need a sync.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._common import (
    EPS_KL,
    INTERPRETED,
    LOG2E,
    Side,
    add_product,
    divides,
    narrow,
    panel_tile,
    prepare,
    product,
    product_strip,
    quarters,
    tile_product,
    tile_shape,
)
from fastuda.kernels._narrow import WIDEST, hop_gradient
from fastuda.kernels._panels import Panel, panel_scale, project, saturate, without_vanishing


class Hop(NamedTuple):
    """The residuals of one direction per query, of one image or of a batch."""

    weight: Tensor
    index: Tensor
    temperature: Tensor
    lse: Tensor

    def epilogue(self, b: int) -> tuple[Tensor, ...]:
        """For each query of image ``b``: weight / temperature, log2(e) / temperature, log-sum-exp in base 2,
        and the match."""
        weight, index, temperature, lse = (x[b] for x in self)
        return weight / temperature, LOG2E / temperature, lse * LOG2E, index.to(torch.int32)


def cosine(
    source: Tensor, target: Tensor, forward: Hop, backward: Hop, library: bool = False
) -> tuple[Tensor, Tensor]:
    """Both gradients through the cosine; with ``library`` the library multiplies, not the tiles."""
    grad_source, grad_target = torch.empty_like(source), torch.empty_like(target)
    s, t = prepare(source, "cosine"), prepare(target, "cosine")
    for b in range(source.shape[0]):
        key, key_inv, inv = t.key[b], t.row[b], s.row[b]
        gradient = torch.zeros_like(key, dtype=torch.float32)
        pull, push = forward.epilogue(b), backward.epilogue(b)
        scale = None
        if key.dtype == torch.float16:
            scale = panel_scale(_largest_slope(pull[0], inv, push[0], key_inv))
            pull, push = (pull[0] * scale, *pull[1:]), (push[0] * scale, *push[1:])
        for query, part, panel, products in _panels(s.query[b], key, library):
            y = gradient.new_empty(query.shape)
            _fill(panel, query, key, part.start, inv[part], key_inv, pull, push, products, kl=False)
            product(panel, key, y)
            add_product(gradient, panel.T, query)
            project(y, query, inv[part], grad_source[b, part], scale)
        project(gradient, key, key_inv, grad_target[b], scale)
    return grad_source, grad_target


def _largest_slope(pull: Tensor, inv: Tensor, push: Tensor, key_inv: Tensor) -> Tensor:
    """[] upper bound of the elements of H, except those of vanishing features. It holds because a probability
    minus its match is at most 1."""
    inv, key_inv = without_vanishing(inv), without_vanishing(key_inv)
    return (pull.abs() * inv).amax() * key_inv.amax() + (push.abs() * key_inv).amax() * inv.amax()


def divergence(
    source: Tensor, target: Tensor, forward: Hop, backward: Hop, library: bool = False
) -> tuple[Tensor, Tensor]:
    """Both gradients through minus the KL divergence: two independent hops, each with its own product."""
    s, t = prepare(source, "kl"), prepare(target, "kl")
    grad_source, grad_target = torch.zeros_like(s.query), torch.zeros_like(t.query)
    _one_way(s, t, forward, grad_source, grad_target, library)
    _one_way(t, s, backward, grad_target, grad_source, library)
    return grad_source.to(source.dtype), grad_target.to(target.dtype)


def _one_way(query: Side, key: Side, hop: Hop, grad_query: Tensor, grad_key: Tensor, library: bool) -> None:
    for b in range(query.query.shape[0]):
        k = key.key[b]
        residuals = hop.epilogue(b)
        if k.shape[1] <= WIDEST:
            by_query, gradient = hop_gradient(query.query[b], k, query.row[b], residuals)
            grad_query[b] += by_query
            grad_key[b] += gradient / (key.query[b] + EPS_KL)
            continue
        gradient = torch.zeros_like(k)
        for q, part, panel, products in _panels(query.query[b], k, library):
            rows = query.row[b, part], key.row[b]
            _fill(panel, q, k, part.start, *rows, residuals, residuals, products, kl=True)
            add_product(grad_query[b, part], panel, k)
            add_product(gradient, panel.T, q)
        grad_key[b] += gradient / (key.query[b] + EPS_KL)


def _panels(
    source: Tensor, key: Tensor, library: bool
) -> Iterator[tuple[Tensor, slice, Tensor, Tensor | None]]:
    """Yield ``(rows, their slice, scratch, products or None)`` panel by panel."""
    n, m = source.shape[0], key.shape[0]
    scratch = Panel(key, m, key.shape[1], n, products=int(library))
    for start in range(0, n, scratch.rows):
        part = slice(start, min(start + scratch.rows, n))
        products = scratch.product(source[part], key) if library else None
        yield source[part], part, scratch.view(part.stop - start, m), products


def _fill(
    panel: Tensor,
    query: Tensor,
    key: Tensor,
    first: int,
    row_a: Tensor,
    row_b: Tensor,
    pull: tuple[Tensor, ...],
    push: tuple[Tensor, ...],
    products: Tensor | None,
    *,
    kl: bool,
) -> None:
    shape = tile_shape(query)
    n, m = panel.shape
    blocks, splits = triton.cdiv(n, shape["BM"]), triton.cdiv(m, shape["BN"])
    association_panel[(blocks * splits,)](
        query,
        key,
        row_a,
        row_b,
        *pull,
        *push,
        panel,
        panel if products is None else products,
        panel.stride(0),
        n,
        m,
        query.shape[1],
        first,
        blocks,
        splits,
        KL=kl,
        LIBRARY=products is not None,
        EVEN=divides(query, shape["BK"]),
        UPCAST=INTERPRETED,
        GROUP=8,
        **shape,
    )


@triton.jit(
    do_not_specialize=["first", "blocks", "splits"],
    do_not_specialize_on_alignment=["row_a", "row_b"],
)
def association_panel(
    a,
    b,
    row_a,
    row_b,
    pull_weight,
    pull_inv,
    pull_lse,
    pull_index,
    push_weight,
    push_inv,
    push_lse,
    push_index,
    panel,
    products,
    stride,
    n,
    m,
    channels,
    first,
    blocks,
    splits,
    KL: tl.constexpr,
    LIBRARY: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The gradient of the loss with respect to ``a @ b.T``, for rows ``first`` to ``first + n`` of the image.
    ``pull`` is the first hop, per row, and ``push`` the second, per column (cosine only)."""
    _, split, rows, at_row, at_col = panel_tile(n, m, blocks, splits, GROUP, BM, BN)
    if not LIBRARY:
        s = tile_product(a, b, at_row, at_col, channels, BM, BN, BK, EVEN, UPCAST)  # [BM, BN]
        parts = quarters(s, BM, BN)  # four of [BM, BN // 4]
    # Operands and scale have the rows of the panel, residuals those of the image, which start at first.
    scale = tl.load(row_a + at_row)  # [BM]
    weight = tl.load(pull_weight + first + at_row)  # [BM]
    inv = tl.load(pull_inv + first + at_row)  # [BM]
    lse = tl.load(pull_lse + first + at_row)  # [BM]
    match = tl.load(pull_index + first + at_row)  # [BM]
    # The epilogue works on four strips of columns; for a whole tile its vectors would spill.
    for strip in tl.static_range(4):
        cols = split * BN + strip * (BN // 4) + tl.arange(0, BN // 4)  # [BN // 4]
        col_ok = cols < m  # [BN // 4]
        if LIBRARY:
            s = product_strip(products, rows, cols, n, m, stride)  # [BM, BN // 4]
        else:
            s = parts[strip]  # [BM, BN // 4]
        if KL:
            s = s + scale[:, None]
        else:
            scale_col = tl.load(row_b + cols, mask=col_ok, other=0.0)  # [BN // 4]
            s = s * scale[:, None] * scale_col[None, :]
        # A probability, clamped: at a vanishing temperature, rounding could make it infinite.
        p = tl.exp2(tl.minimum(s * inv[:, None] - lse[:, None], 0.0))  # [BM, BN // 4]
        g = weight[:, None] * tl.where(match[:, None] == cols[None, :], p - 1.0, p)  # [BM, BN // 4]
        if not KL:
            # The second hop has the same similarities by column, so its gradient needs no product of its own.
            back = tl.load(push_inv + cols, mask=col_ok, other=0.0)  # [BN // 4]
            back_lse = tl.load(push_lse + cols, mask=col_ok, other=0.0)  # [BN // 4]
            back_match = tl.load(push_index + cols, mask=col_ok, other=-1)  # [BN // 4]
            back_weight = tl.load(push_weight + cols, mask=col_ok, other=0.0)  # [BN // 4]
            p = tl.exp2(tl.minimum(s * back[None, :] - back_lse[None, :], 0.0))  # [BM, BN // 4]
            hit = back_match[None, :] == (first + rows)[:, None]  # [BM, BN // 4]
            g += back_weight[None, :] * tl.where(hit, p - 1.0, p)
            # The panel includes both norms, so it is multiplied by the raw features.
            g = g * scale[:, None] * scale_col[None, :]
        # Zeros fill a row up to its stride, so that stores are 16 bytes wide.
        to = panel + rows.to(tl.int64)[:, None] * stride + cols[None, :]  # [BM, BN // 4]
        g = tl.where(col_ok[None, :], g, 0.0)
        tl.store(
            to, narrow(saturate(g, panel), panel, UPCAST), mask=(rows < n)[:, None] & (cols < stride)[None, :]
        )
