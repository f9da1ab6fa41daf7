"""Lovasz-Softmax straight from low-resolution logits: one class at a time, so that no one-hot plane and no
full-resolution logit is stored.

Nothing is asked of the device on the way, so that the host never waits. The gradient is gathered at low
resolution, without atomics: two runs agree bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._common import on_device, padded_classes
from fastuda.kernels._upsample import (
    column_weights,
    output_columns,
    outputs_around,
    owned_columns,
    program_block,
    stretched_block,
    stretched_rows,
    stretches,
)

TILE = 2048
"""Classes times outputs of a tile."""

OUTPUTS = 256
"""Outputs of a tile of one class."""

COLUMNS = 32
"""Source columns of a program that gathers the gradient."""


def lovasz_softmax_fwd(
    x: Tensor, labels: Tensor, from_logits: bool, align_corners: bool, ignore_index: int, gradient: bool
) -> tuple[Tensor, Tensor]:
    """``(loss, its gradient or [0])`` in float32; the low-level op of the same name."""
    x, labels = x.contiguous(), labels.contiguous()
    classes = x.shape[1]
    known = (labels != ignore_index) & (labels >= 0) & (labels < classes)
    labels = torch.where(known, labels, -1).int()
    options = dict(dtype=torch.float32, device=x.device)
    grad = torch.zeros(x.shape if gradient else (0,), **options)
    if not labels.numel():
        return torch.zeros((), **options), grad
    loss = torch.zeros((), dtype=torch.float64, device=x.device)
    present = torch.zeros((), dtype=torch.int64, device=x.device)
    with on_device(x):
        upsampled = _Upsampled(x, labels, from_logits, align_corners)
        inner = torch.zeros(labels.shape if gradient else (0,), **options)
        for c in range(classes):
            order, slope, part, own = _class_slopes(upsampled.errors(c), labels, c)
            loss += part
            present += own > 0
            if gradient:
                dense = torch.empty(labels.shape, **options)
                dense.view(-1).scatter_(0, order, slope)
                if from_logits:
                    upsampled.shrink(c, 1, dense, grad)
                    inner.addcmul_(upsampled.probability(c), dense)
                else:
                    grad[:, c] = dense
        if gradient and from_logits:  # of softmax: p_c (slope_c - sum_k p_k slope_k)
            upsampled.shrink(0, classes, inner, grad, less=True)
        present = present.clamp(min=1)
        if gradient:
            grad /= present
        return (loss / present).float(), grad


def _class_slopes(errors: Tensor, labels: Tensor, c: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one class: the pixels in falling order of their errors, the loss's slope by their probabilities, the
    loss, and how many pixels are of the class; without any the slopes are 0.

    All pixels are sorted, though behind the class's last one no slope is left: to leave them out would be to
    wait for their number.
    """
    error, order = errors.flatten().sort(descending=True, stable=True)
    hit = (labels.flatten() == c)[order]
    hits = hit.cumsum(0)
    slope = torch.empty_like(error)
    weighted = torch.empty_like(error)
    jaccard_slopes[(triton.cdiv(len(error), OUTPUTS),)](
        error, hit, hits, slope, weighted, len(error), BX=OUTPUTS, num_warps=4
    )
    return order, slope, weighted.sum(dtype=torch.float64), hits[-1]


class _Upsampled:
    """The probabilities of the upsampled logits, class by class, from the pixels' log-sum-exp; or those that
    are given."""

    def __init__(self, x: Tensor, labels: Tensor, from_logits: bool, align_corners: bool) -> None:
        self.x, self.labels, self.from_logits = x, labels, from_logits
        self.batch, self.classes, self.h, self.w = x.shape
        self.height, self.width = labels.shape[1:]
        self.rows, self.columns = stretches(x, (self.h, self.w), (self.height, self.width), align_corners)
        self.lse = torch.empty(labels.shape, dtype=torch.float32, device=x.device)
        if from_logits:
            padded = padded_classes(self.classes)
            outputs = max(16, TILE // padded)
            upsampled_sums[(self.batch * self.h * triton.cdiv(self.width, outputs),)](
                *(x, self.lse, *self._tables(), self.classes, *self._sizes()),
                KP=padded,
                BX=outputs,
                num_warps=4,
            )

    def errors(self, c: int) -> Tensor:
        """``|[y = c] - p_c|`` [B, H, W]; -1 where there is no label."""
        return self._plane(c, True)

    def probability(self, c: int) -> Tensor:
        """``p_c`` [B, H, W]."""
        return self._plane(c, False)

    def _plane(self, c: int, errors: bool) -> Tensor:
        out = torch.empty_like(self.lse)
        class_plane[(self.batch * self.h * triton.cdiv(self.width, OUTPUTS),)](
            *(self.x, self.labels, self.lse, out, *self._tables(), c, self.classes, *self._sizes()),
            FROM_LOGITS=self.from_logits,
            ERRORS=errors,
            BX=OUTPUTS,
            num_warps=4,
        )
        return out

    def shrink(self, c: int, count: int, slope: Tensor, grad: Tensor, less: bool = False) -> None:
        """``grad[:, c : c + count]`` = the low-resolution gradient of ``p_c slope``; with ``less`` that is
        taken away."""
        owned = owned_columns(OUTPUTS, self.w, self.width, COLUMNS)
        class_gradient[(self.batch * self.h * triton.cdiv(self.w, owned), count)](
            *(self.x, self.lse, slope, grad, self.rows.share, self.rows.start, *self.columns),
            *(c, self.classes, *self._sizes()),
            LESS=less,
            OWNED=owned,
            BC=COLUMNS,
            BX=OUTPUTS,
            num_warps=4,
        )

    def _tables(self) -> tuple[Tensor, ...]:
        return self.rows.share, self.rows.start, self.columns.first, self.columns.share

    def _sizes(self) -> tuple[int, ...]:
        return self.h, self.w, self.height, self.width


@triton.jit
def jaccard_slopes(error, hit, hits, slope, weighted, n, BX: tl.constexpr):
    """Differences of the Jaccard loss along the sorted pixels, without cancellation; the sign is that of the
    error's derivative. The last of ``hits`` is the number of the class's pixels."""
    # The place is int64, as the counts are that it meets.
    i = tl.program_id(0).to(tl.int64) * BX + tl.arange(0, BX)  # [BX]
    ok = i < n  # [BX]
    own = tl.load(hits + n - 1)
    mine = tl.load(hit + i, mask=ok, other=0) != 0  # [BX]
    found = tl.load(hits + i, mask=ok, other=0)  # [BX]
    # Counts are subtracted as integers, exactly, and only their quotients are float32.
    union = (own + i + 1 - found).to(tl.float32)  # [BX]
    step = tl.where(mine, 1.0, (own - found).to(tl.float32) / tl.maximum(union - 1.0, 1.0)) / union  # [BX]
    tl.store(slope + i, tl.where(mine, -step, step), mask=ok)
    # The loss is summed later, in float64: here it is a term per pixel.
    tl.store(weighted + i, step * tl.load(error + i, mask=ok, other=0.0), mask=ok)


@triton.jit
def upsampled_sums(
    logits,
    lse,
    row_share,
    row_start,
    column_first,
    column_share,
    classes,
    h,
    w,
    height,
    width,
    KP: tl.constexpr,
    BX: tl.constexpr,
):
    """A program per image, source row and ``BX`` outputs along it: log-sum-exp of the outputs below it."""
    # The two source rows are stretched once for all output rows between them.
    # x: [BX]; k: [KP]; top and bottom: [KP, BX]; b and r are scalars
    b, r, x, k, top, bottom = stretched_block(
        logits, column_first, column_share, classes, h, w, width, KP, BX
    )
    ok = x < width  # [BX]
    for y in range(tl.load(row_start + r), tl.load(row_start + r + 1)):
        # Padded classes are -inf, so that they add nothing to the sum.
        # [KP, BX]
        value = tl.where((k < classes)[:, None], top + tl.load(row_share + y) * (bottom - top), float("-inf"))
        best = tl.max(value, 0)  # [BX]
        total = tl.sum(tl.exp(value - best[None, :]), 0)  # [BX]
        tl.store(lse + (b * height + y) * width + x, best + tl.log(total), mask=ok)


@triton.jit(do_not_specialize=["c"])
def class_plane(
    x,
    labels,
    lse,
    out,
    row_share,
    row_start,
    column_first,
    column_share,
    c,
    classes,
    h,
    w,
    height,
    width,
    FROM_LOGITS: tl.constexpr,
    ERRORS: tl.constexpr,
    BX: tl.constexpr,
):
    """A program per image, source row and ``BX`` outputs along it: the class's probabilities, or errors."""
    b, r, start = program_block(h, width, 1, BX)
    i, ok, first, share = output_columns(start, width, column_first, column_share, BX)  # [BX] each
    plane = x + (b * classes + c) * tl.cast(h, tl.int64) * w
    # The class's two source rows are stretched once for all output rows between them.
    top, bottom = stretched_rows(plane, r, h, w, first, share, ok)  # [BX] each
    for y in range(tl.load(row_start + r), tl.load(row_start + r + 1)):
        at = (b * height + y) * width + i  # [BX]
        found = top + tl.load(row_share + y) * (bottom - top)  # [BX]
        # The kept log-sum-exp makes a probability of one class's logit, without the others.
        if FROM_LOGITS:
            found = tl.exp(found - tl.load(lse + at, mask=ok, other=0.0))
        if ERRORS:
            # Pixels without a label get -1, below every error, so that they are sorted to the end.
            label = tl.load(labels + at, mask=ok, other=-1)  # [BX]
            found = tl.where(label == c, 1.0 - found, found)
            found = tl.where(found < 0.0, 0.0, found)
            found = tl.where(label < 0, -1.0, found)
        tl.store(out + at, found, mask=ok)


@triton.jit(do_not_specialize=["c"])
def class_gradient(
    x,
    lse,
    slope,
    grad,
    row_share,
    row_start,
    column_first,
    column_share,
    column_start,
    c,
    classes,
    h,
    w,
    height,
    width,
    LESS: tl.constexpr,
    OWNED: tl.constexpr,
    BC: tl.constexpr,
    BX: tl.constexpr,
):
    """A program per image, source row and ``OWNED`` source columns, and class from ``c``: it collects
    ``p_c slope`` of the outputs between them and their neighbours."""
    b, r0, c0 = program_block(h, w, 1, OWNED)
    c += tl.program_id(1)
    column = c0 + tl.arange(0, BC)  # [BC]
    plane = (b * classes + c) * tl.cast(h, tl.int64) * w
    begin, end = outputs_around(column_start, c0, w, OWNED)
    total = tl.zeros((BC,), tl.float32)  # [BC]
    for x0 in range(begin, end, BX):
        i, ok, first, share = output_columns(x0, end, column_first, column_share, BX)  # [BX] each
        # Outputs below this source row and the one before it reach the row: both are walked, with no atomics.
        gathered = tl.zeros((BX,), tl.float32)  # [BX]
        for r in range(tl.maximum(r0 - 1, 0), r0 + 1):
            top, bottom = stretched_rows(x + plane, r, h, w, first, share, ok)  # [BX] each
            for y in range(tl.load(row_start + r), tl.load(row_start + r + 1)):
                at = (b * height + y) * width + i  # [BX]
                row = tl.load(row_share + y)
                p = tl.exp(top + row * (bottom - top) - tl.load(lse + at, mask=ok, other=0.0))  # [BX]
                # below the last source row there is none: its share belongs to the last row itself
                weight = tl.where(r == r0, tl.where(r0 == h - 1, 1.0, 1.0 - row), row)
                gathered += weight * tl.where(ok, p * tl.load(slope + at, mask=ok, other=0.0), 0.0)
        # The rows' sum is shrunk to the sources' columns once per run of outputs.
        total += tl.sum(column_weights(first, share, w, column) * gathered[:, None], 0)
    # Columns past the owned ones are another program's.
    here = (column < c0 + OWNED) & (column < w)  # [BC]
    to = grad + plane + tl.cast(r0, tl.int64) * w + column  # [BC]
    if LESS:
        total = tl.load(to, mask=here, other=0.0) - total
    tl.store(to, total, mask=here)
