"""Probabilities of upsampled logits class by class, computed from the log-sum-exp of every pixel: as keys to
sort, multiplied by slopes, and their gradient at low resolution."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._common import padded_classes
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
"""Number of classes times number of outputs of a tile."""

OUTPUTS = 256
"""Number of outputs of a tile of one class."""

COLUMNS = 32
"""Number of source columns of a program that gathers the gradient."""


class Upsampled:
    """The probabilities of the upsampled logits, class by class, from the pixels' log-sum-exp; or the given
    probabilities."""

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

    def keys(self, c: int, count: int) -> Tensor:
        """Keys [count, pixels] of ``count`` classes from ``c``, in the order of ``|[y = c] - p_c|``; see
        :func:`error_keys`."""
        out = torch.empty(count, self.lse.numel(), dtype=torch.int32, device=self.lse.device)
        error_keys[(self.batch * self.h * triton.cdiv(self.width, OUTPUTS), count)](
            *(self.x, self.labels, self.lse, out, *self._tables(), c, self.classes, *self._sizes()),
            out.shape[1],
            FROM_LOGITS=self.from_logits,
            BX=OUTPUTS,
            num_warps=4,
        )
        return out

    def add_inner(self, c: int, slopes: Tensor, inner: Tensor) -> None:
        """``inner += sum_k p_k slope_k`` over the classes from ``c``."""
        inner_sums[(self.batch * self.h * triton.cdiv(self.width, OUTPUTS),)](
            *(self.x, self.lse, slopes, inner, *self._tables(), c, len(slopes), self.classes),
            *self._sizes(),
            slopes.stride(0),
            BX=OUTPUTS,
            num_warps=4,
        )

    def shrink(self, c: int, slopes: Tensor, grad: Tensor, less: bool = False) -> None:
        """``grad[:, c : c + G]`` = the low-resolution gradient of ``p_c slope`` [G, B, H, W]; with ``less``
        it is subtracted instead."""
        owned = owned_columns(OUTPUTS, self.w, self.width, COLUMNS)
        class_gradient[(self.batch * self.h * triton.cdiv(self.w, owned), len(slopes))](
            *(self.x, self.lse, slopes, grad, self.rows.share, self.rows.start, *self.columns),
            *(c, self.classes, *self._sizes()),
            slopes.stride(0),
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
    # The two source rows are stretched once, for all output rows between them.
    # x: [BX]; k: [KP]; top and bottom: [KP, BX]; b and r are scalars
    b, r, x, k, top, bottom = stretched_block(
        logits, column_first, column_share, classes, h, w, width, KP, BX
    )
    ok = x < width  # [BX]
    for y in range(tl.load(row_start + r), tl.load(row_start + r + 1)):
        # Padded classes are -inf and add nothing to the sum.
        # [KP, BX]
        value = tl.where((k < classes)[:, None], top + tl.load(row_share + y) * (bottom - top), float("-inf"))
        best = tl.max(value, 0)  # [BX]
        total = tl.sum(tl.exp(value - best[None, :]), 0)  # [BX]
        tl.store(lse + (b * height + y) * width + x, best + tl.log(total), mask=ok)


@triton.jit(do_not_specialize=["c"])
def error_keys(
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
    pixels,
    FROM_LOGITS: tl.constexpr,
    BX: tl.constexpr,
):
    """A program per image, source row and ``BX`` outputs along it, and class from ``c``. A key is an integer
    with the bits of the error, followed by a bit that says whether the pixel belongs to the class. Keys have
    the order of the errors.

    Pixels without a label have the smallest key: slopes are 0 after the last pixel of the class."""
    b, r, start = program_block(h, width, 1, BX)
    to = out + tl.program_id(1).to(tl.int64) * pixels
    c += tl.program_id(1)
    i, ok, first, share = output_columns(start, width, column_first, column_share, BX)  # [BX] each
    plane = x + (b * classes + c) * tl.cast(h, tl.int64) * w
    # The two source rows of the class are stretched once, for all output rows between them.
    top, bottom = stretched_rows(plane, r, h, w, first, share, ok)  # [BX] each
    for y in range(tl.load(row_start + r), tl.load(row_start + r + 1)):
        at = (b * height + y) * width + i  # [BX]
        p = top + tl.load(row_share + y) * (bottom - top)  # [BX]
        # The stored log-sum-exp gives the probability from the logit of this class alone.
        if FROM_LOGITS:
            p = tl.exp(p - tl.load(lse + at, mask=ok, other=0.0))
        label = tl.load(labels + at, mask=ok, other=-1)  # [BX]
        error = tl.where(label == c, 1.0 - p, p)  # [BX]
        error = tl.where(error < 0.0, 0.0, error)
        # All floats from 0 to NaN are in the order of their bits; the sign bit is free for the hit.
        key = (error.to(tl.uint32, bitcast=True) << 1) | tl.where(label == c, 1, 0).to(tl.uint32)  # [BX]
        key = tl.where(label < 0, 0, key) ^ 0x80000000  # to the order of signed integers
        tl.store(to + at, key.to(tl.int32, bitcast=True), mask=ok)


@triton.jit(do_not_specialize=["c", "count"])
def inner_sums(
    x,
    lse,
    slopes,
    inner,
    row_share,
    row_start,
    column_first,
    column_share,
    c,
    count,
    classes,
    h,
    w,
    height,
    width,
    pixels,
    BX: tl.constexpr,
):
    """A program per image, source row and ``BX`` outputs along it: adds ``p_k slope_k`` over ``count``
    classes from ``c``."""
    b, r, start = program_block(h, width, 1, BX)
    i, ok, first, share = output_columns(start, width, column_first, column_share, BX)  # [BX] each
    plane = tl.cast(h, tl.int64) * w
    for y in range(tl.load(row_start + r), tl.load(row_start + r + 1)):
        at = (b * height + y) * width + i  # [BX]
        row = tl.load(row_share + y)
        own = tl.load(lse + at, mask=ok, other=0.0)  # [BX]
        total = tl.load(inner + at, mask=ok, other=0.0)  # [BX]
        # The inner loop goes over classes, so that their sum stays in registers; source rows are cached.
        for k in range(count):
            planes = x + (b * classes + c + k) * plane
            top, bottom = stretched_rows(planes, r, h, w, first, share, ok)  # [BX] each
            p = tl.exp(top + row * (bottom - top) - own)  # [BX]
            total += p * tl.load(slopes + tl.cast(k, tl.int64) * pixels + at, mask=ok, other=0.0)
        tl.store(inner + at, total, mask=ok)


@triton.jit(do_not_specialize=["c", "pixels"])
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
    pixels,
    LESS: tl.constexpr,
    OWNED: tl.constexpr,
    BC: tl.constexpr,
    BX: tl.constexpr,
):
    """A program per image, source row and ``OWNED`` source columns, and class from ``c``: it collects
    ``p_c slope`` of the outputs between them and their neighbours."""
    b, r0, c0 = program_block(h, w, 1, OWNED)
    slope += tl.program_id(1).to(tl.int64) * pixels
    c += tl.program_id(1)
    column = c0 + tl.arange(0, BC)  # [BC]
    plane = (b * classes + c) * tl.cast(h, tl.int64) * w
    begin, end = outputs_around(column_start, c0, w, OWNED)
    total = tl.zeros((BC,), tl.float32)  # [BC]
    for x0 in range(begin, end, BX):
        i, ok, first, share = output_columns(x0, end, column_first, column_share, BX)  # [BX] each
        # The loop covers the outputs below this source row and the one before it: no atomics are needed.
        gathered = tl.zeros((BX,), tl.float32)  # [BX]
        for r in range(tl.maximum(r0 - 1, 0), r0 + 1):
            top, bottom = stretched_rows(x + plane, r, h, w, first, share, ok)  # [BX] each
            for y in range(tl.load(row_start + r), tl.load(row_start + r + 1)):
                at = (b * height + y) * width + i  # [BX]
                row = tl.load(row_share + y)
                p = tl.exp(top + row * (bottom - top) - tl.load(lse + at, mask=ok, other=0.0))  # [BX]
                # the last source row has no next row and takes that share itself
                weight = tl.where(r == r0, tl.where(r0 == h - 1, 1.0, 1.0 - row), row)
                gathered += weight * tl.where(ok, p * tl.load(slope + at, mask=ok, other=0.0), 0.0)
        # The sum over rows is reduced to the source columns once per run of outputs.
        total += tl.sum(column_weights(first, share, w, column) * gathered[:, None], 0)
    # Other programs own the columns after this program's.
    here = (column < c0 + OWNED) & (column < w)  # [BC]
    to = grad + plane + tl.cast(r0, tl.int64) * w + column  # [BC]
    if LESS:
        total = tl.load(to, mask=here, other=0.0) - total
    tl.store(to, total, mask=here)
