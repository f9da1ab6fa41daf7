"""The aggregation's gradient through the cosine where the library multiplies: every row is complete in its
own panel.

With ``H`` the gradient of the products, an image against itself needs ``(H + H^T) x`` and ``W^T g``. Since
``s_ij`` is ``s_ji``, one pass over a panel of ``s_ij``, ``g_i . x_j`` and ``x_i . g_j`` makes the rows of
``H + H^T`` and of ``W^T`` both: five library products, and no sum that later panels add to.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._common import INTERPRETED, LOG2E, Side, narrow, product, product_strip
from fastuda.kernels._panels import Panel, project, saturate


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
    out: Tensor,
) -> None:
    """The input's gradient of image ``b`` into ``out`` [N, C]. Vectors are as for
    :func:`fastuda.kernels._aggregate_gradient.fill_slopes`; ``scale`` is what ``factor`` has in it beside."""
    x = side.query[b]
    n, c = x.shape
    inv_norm = side.row[b]
    height, width = (64, 128) if INTERPRETED else (64, 32)
    scratch = Panel(x, n, c, n, count=2, products=3)
    for start in range(0, n, scratch.rows):
        part = slice(start, min(start + scratch.rows, n))
        rows = part.stop - start
        products = (
            scratch.product(x[part], x),
            scratch.product(grad[part], x, index=1),
            scratch.product(x[part], grad, index=2),
        )
        weights, slopes = (scratch.view(rows, n, i) for i in (0, 1))
        symmetric_panel[(triton.cdiv(rows, height), triton.cdiv(n, width))](
            *products,
            inv_norm,
            own,
            temperature,
            log_sum,
            centre,
            factor,
            weights,
            slopes,
            scratch.stride,
            start,
            rows,
            n,
            LOG2E=LOG2E,
            UPCAST=INTERPRETED,
            BM=height,
            BN=width,
            num_warps=4,
        )
        by_values = own.new_empty(rows, c)
        by_similarity = own.new_empty(rows, c)
        product(weights, grad, by_values)
        product(slopes, x, by_similarity)
        rest = (grad[part], by_values, alpha)
        project(by_similarity, x[part], inv_norm[part], out[part], scale, rest)


@triton.jit
def softmax_weight(s, own, temperature, log_sum, LOG2E: tl.constexpr):
    """``exp((s - own) / temperature - log_sum)``, at most 1: rounding must not make more of it."""
    return tl.exp2(tl.minimum(((s - own) / temperature - log_sum) * LOG2E, 0.0))


@triton.jit(
    do_not_specialize=["first"],
    do_not_specialize_on_alignment=["inv_norm", "own", "temperature", "log_sum", "factor"],
)
def symmetric_panel(
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
    slopes,
    stride,
    first,
    n,
    m,
    LOG2E: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Rows ``first`` to ``first + n`` of ``m`` of ``W^T`` and of ``H + H^T``, from the products
    ``x_i . x_j``, ``g_i . x_j`` and ``x_i . g_j``."""
    # Rows and columns past the end read the last one, a valid address; what they give is masked.
    rows = tl.program_id(0) * BM + tl.arange(0, BM)  # [BM]
    cols = tl.program_id(1) * BN + tl.arange(0, BN)  # [BN]
    i = first + tl.minimum(rows, n - 1)  # [BM]
    j = tl.minimum(cols, m - 1)  # [BN]
    # Pixels of both axes are of one image: every vector is read by row and by column.
    inv_i, inv_j = tl.load(inv_norm + i)[:, None], tl.load(inv_norm + j)[None, :]  # [BM, 1], [1, BN]
    own_i, own_j = tl.load(own + i)[:, None], tl.load(own + j)[None, :]  # [BM, 1], [1, BN]
    # The pixel's own similarity is put in exactly: it is the row's maximum, to which weights relate.
    s = product_strip(similarities, rows, cols, n, m, stride) * inv_i * inv_j  # [BM, BN]
    s = tl.where(i[:, None] == j[None, :], own_i, s)
    # One similarity gives both weights, since s_ij is s_ji.
    t_i, t_j = tl.load(temperature + i)[:, None], tl.load(temperature + j)[None, :]  # [BM, 1], [1, BN]
    forth = softmax_weight(s, own_i, t_i, tl.load(log_sum + i)[:, None], LOG2E)  # [BM, BN] W_ij
    back = softmax_weight(s, own_j, t_j, tl.load(log_sum + j)[None, :], LOG2E)  # [BM, BN] W_ji
    # H_ij and H_ji are added in float32 and rounded once; the row's inverse norm is in the factor.
    d = product_strip(row_values, rows, cols, n, m, stride) - tl.load(centre + i)[:, None]  # [BM, BN]
    h = forth * d * tl.load(factor + i)[:, None] * inv_j  # [BM, BN]
    d = product_strip(column_values, rows, cols, n, m, stride) - tl.load(centre + j)[None, :]
    h += back * d * tl.load(factor + j)[None, :] * inv_i
    # Zeros fill a row up to its stride: stores are then 16 bytes wide.
    inside = (cols < m)[None, :]  # [1, BN]
    to = rows.to(tl.int64)[:, None] * stride + cols[None, :]  # [BM, BN]
    mask = (rows < n)[:, None] & (cols < stride)[None, :]  # [BM, BN]
    tl.store(weights + to, narrow(tl.where(inside, back, 0.0), weights, UPCAST), mask=mask)
    h = saturate(tl.where(inside, h, 0.0), slopes)
    tl.store(slopes + to, narrow(h, slopes, UPCAST), mask=mask)
