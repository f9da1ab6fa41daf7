"""The aggregation of narrow features, such as the probabilities of KL: the walks of
:mod:`fastuda.kernels._narrow`, with the exact similarity of a pixel to itself."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._common import LOG2E
from fastuda.kernels._narrow import Walk, feature_rows, store_sums


def mixed(values: Tensor, key: Tensor, entropy: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """``(sum_j e_ij values_j, sum_j e_ij)`` with ``e_ij = exp(s_ij / t_i)`` and ``s_ii = 0``, where
    ``s = values . key + entropy``. ``s_ii`` is the largest of its row."""
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

    ``centre`` [N] is an estimate of that sum. Its error is summed during the walk and subtracted at the end,
    because the key's logarithms would magnify the rounding of a difference of large sums.
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
def own_weights(s, rows, cols, entropy, temperature, log_sum, most, LOG2E: tl.constexpr):
    """``exp(s / t - log_sum)`` of products ``s``, at most ``exp2(most)``; the similarity of a pixel to itself
    is 0. Row vectors have the shape of the tile."""
    # A pixel's similarity to itself is set exactly: it is the row's maximum, the reference of the weights.
    s = tl.where(rows == cols, 0.0, s + entropy)  # [BO, BT]
    return tl.exp2(tl.minimum(s * (LOG2E / temperature) - log_sum * LOG2E, most))


@triton.jit(
    do_not_specialize=["span"],
    do_not_specialize_on_alignment=["values", "key", "entropy", "temperature"],
)
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
    # One walk sums both the weights and the weighted values; their quotient is taken after it.
    total = tl.zeros((BO,), tl.float32)  # [BO]
    acc = tl.zeros((BO, CP), tl.float32)  # [BO, CP]
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, n), BT):
        cols = start + tl.arange(0, BT)  # [BT]
        # [BO, BT]
        s = tl.dot(mine, tl.trans(feature_rows(key, cols, n, channels, CP)), input_precision="ieee")
        # at a vanishing temperature, rounding could make a weight infinite
        e = own_weights(s, rows[:, None], cols[None, :], extra, t, 0.0, 100.0, LOG2E)  # [BO, BT]
        # Without the mask, columns past the end would count in the sum of weights.
        e = tl.where((cols < n)[None, :], e, 0.0)
        total += tl.sum(e, 1)
        acc = tl.dot(e, feature_rows(values, cols, n, channels, CP), acc, input_precision="ieee")
    store_sums(out, acc, rows, n, channels, CP)
    tl.store(out_total + tl.program_id(1).to(tl.int64) * n + rows, total, mask=row_ok)


@triton.jit(
    do_not_specialize=["span"],
    do_not_specialize_on_alignment=["values", "key", "grad", "entropy", "temperature", "log_sum"],
)
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
    """For a block of rows: ``sum_j W_ij (d_ij - centre_i) key_j``, ``sum_j W_ij key_j`` and
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
    # The centre is an estimate. Its error is summed as well, and its effect is subtracted after the walk.
    acc = tl.zeros((BO, CP), tl.float32)  # [BO, CP]
    plain = tl.zeros((BO, CP), tl.float32)  # [BO, CP]
    error = tl.zeros((BO,), tl.float32)  # [BO]
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, n), BT):
        cols = start + tl.arange(0, BT)  # [BT]
        k = feature_rows(key, cols, n, channels, CP)  # [BT, CP]
        # Full float32 and a centred d keep the errors small that the key's logarithms would magnify.
        s = tl.dot(mine, tl.trans(k), input_precision="ieee")  # [BO, BT]
        # [BO, BT]
        d = tl.dot(g, tl.trans(feature_rows(values, cols, n, channels, CP)), input_precision="ieee") - middle
        w = own_weights(s, rows[:, None], cols[None, :], extra, t, less, 0.0, LOG2E)  # [BO, BT]
        # Without the mask, columns past the end would count in the error.
        w = tl.where((cols < n)[None, :], w, 0.0)
        error += tl.sum(w * d, 1)
        acc = tl.dot(w * d, k, acc, input_precision="ieee")
        plain = tl.dot(w, k, plain, input_precision="ieee")
    store_sums(out, acc, rows, n, channels, CP)
    store_sums(out_plain, plain, rows, n, channels, CP)
    tl.store(out_error + tl.program_id(1).to(tl.int64) * n + rows, error, mask=row_ok)


@triton.jit(
    do_not_specialize=["span"],
    do_not_specialize_on_alignment=["values", "key", "grad", "entropy", "temperature", "log_sum", "factor"],
)
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
    """For a block of columns: ``sum_i H_ij values_i`` and ``sum_i W_ij grad_i``."""
    # The block's features are loaded once and stay for the whole walk.
    cols = tl.program_id(0) * BO + tl.arange(0, BO)  # [BO]
    k = feature_rows(key, cols, n, channels, CP)  # [BO, CP]
    v = feature_rows(values, cols, n, channels, CP)  # [BO, CP]
    # Both sums use the same weights, which one walk computes once.
    acc = tl.zeros((BO, CP), tl.float32)  # [BO, CP]
    acc_values = tl.zeros((BO, CP), tl.float32)  # [BO, CP]
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, n), BT):
        # The walk goes over rows, so the vectors of the rows are loaded again for every tile.
        rows = start + tl.arange(0, BT)  # [BT]
        row_ok = rows < n  # [BT]
        q = feature_rows(values, rows, n, channels, CP)  # [BT, CP]
        g = feature_rows(grad, rows, n, channels, CP)  # [BT, CP]
        extra = tl.load(entropy + rows, mask=row_ok, other=0.0)[None, :]  # [1, BT]
        t = tl.load(temperature + rows, mask=row_ok, other=1.0)[None, :]  # [1, BT]
        less = tl.load(log_sum + rows, mask=row_ok, other=0.0)[None, :]  # [1, BT]
        middle = tl.load(centre + rows, mask=row_ok, other=0.0)[None, :]  # [1, BT]
        step = tl.load(factor + rows, mask=row_ok, other=0.0)[None, :]  # [1, BT]
        # The tile is computed transposed, so that its product with the rows is the sum of the columns.
        s = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BO, BT]
        d = tl.dot(v, tl.trans(g), input_precision="ieee") - middle  # [BO, BT]
        w = own_weights(s, rows[None, :], cols[:, None], extra, t, less, 0.0, LOG2E)  # [BO, BT]
        # Rows past the end must not count in the sums.
        w = tl.where(row_ok[None, :], w, 0.0)
        acc = tl.dot(w * d * step, q, acc, input_precision="ieee")
        acc_values = tl.dot(w, g, acc_values, input_precision="ieee")
    store_sums(out, acc, cols, n, channels, CP)
    store_sums(out_values, acc_values, cols, n, channels, CP)
