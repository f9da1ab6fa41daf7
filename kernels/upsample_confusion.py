"""Confusion matrix and label map of bilinearly upsampled scores, without scores at full resolution."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._common import on_device, padded_classes
from fastuda.kernels._upsample import stretched_block, stretches

TILE = 2048
"""Number of classes times number of outputs of a tile."""

BINS = 1024
"""Largest histogram that a program keeps; with more pairs of classes, every pixel uses an atomic add."""


def upsample_confusion_fwd(
    scores: Tensor, labels: Tensor, align_corners: bool, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """``([K, K] int64, [B, H, W] uint8)``; the low-level op of the same name.

    Raises:
        ValueError: a label is neither a class nor ``ignore_index``.
    """
    scores, labels = scores.contiguous(), labels.contiguous()
    batch, classes, h, w = scores.shape
    height, width = labels.shape[-2:]
    padded = padded_classes(classes)
    outputs = max(16, TILE // padded)
    matrix = torch.zeros(classes * classes + 1, dtype=torch.int64, device=scores.device)
    predicted = torch.empty(labels.shape, dtype=torch.uint8, device=scores.device)
    bins = triton.next_power_of_2(classes * classes)
    with on_device(scores):
        rows, columns = stretches(scores, (h, w), (height, width), align_corners)
        upsampled_counts[(batch * h * triton.cdiv(width, outputs),)](
            scores,
            labels,
            matrix,
            predicted,
            rows.share,
            rows.start,
            columns.first,
            columns.share,
            classes,
            h,
            w,
            height,
            width,
            ignore_index,
            HISTOGRAM=bins <= BINS,
            BINS=max(16, min(bins, BINS)),
            KP=padded,
            BX=outputs,
            num_warps=4,
        )
    if int(matrix[-1]):
        raise ValueError(f"labels hold classes outside 0..{classes - 1} other than ignore_index")
    return matrix[:-1].reshape(classes, classes).clone(), predicted


@triton.jit
def upsampled_counts(
    scores,
    labels,
    matrix,
    predicted,
    row_share,
    row_start,
    column_first,
    column_share,
    classes,
    h,
    w,
    height,
    width,
    ignore,
    HISTOGRAM: tl.constexpr,
    BINS: tl.constexpr,
    KP: tl.constexpr,
    BX: tl.constexpr,
):
    """A program per image, source row and ``BX`` outputs along it; the last entry of ``matrix`` counts the
    invalid labels."""
    # The two source rows are stretched once, for all output rows between them.
    # x: [BX]; k: [KP]; top and bottom: [KP, BX]; b and r are scalars
    b, r, x, k, top, bottom = stretched_block(
        scores, column_first, column_share, classes, h, w, width, KP, BX
    )
    ok = x < width  # [BX]
    k_ok = k < classes  # [KP]
    counts = tl.zeros((BINS,), tl.int32)  # [BINS]
    alien = tl.zeros((BX,), tl.int32)  # [BX]
    for y in range(tl.load(row_start + r), tl.load(row_start + r + 1)):
        row = tl.load(row_share + y)
        # Padded classes are -inf, so none of them is the best.
        value = tl.where(k_ok[:, None], top + row * (bottom - top), float("-inf"))  # [KP, BX]
        best = tl.max(value, 0)  # [BX]
        # The lowest of equal classes wins; a column of NaN equals none and goes to the last class.
        guess = tl.min(tl.where((value == best[None, :]) & k_ok[:, None], k[:, None], KP), 0)  # [BX]
        guess = tl.minimum(guess, classes - 1).to(tl.int32)
        at = (b * height + y) * width + x  # [BX]
        tl.store(predicted + at, guess.to(tl.uint8), mask=ok)
        # Invalid labels are counted here, because a separate check would read all labels once more.
        label = tl.load(labels + at, mask=ok, other=ignore).to(tl.int64)  # [BX]
        inside = (label >= 0) & (label < classes)  # [BX]
        keep = ok & (label != ignore) & inside  # [BX]
        alien += (ok & (label != ignore) & (inside == 0)).to(tl.int32)
        cell = tl.where(keep, label * classes + guess, 0).to(tl.int32)  # [BX]
        # If the pairs are few, they fit a histogram of the program, which saves an atomic per pixel.
        if HISTOGRAM:
            counts += tl.histogram(cell, BINS, mask=keep)
        else:
            tl.atomic_add(matrix + cell, tl.full((BX,), 1, tl.int64), mask=keep)
    # Integer sums do not depend on the order, so two runs agree in spite of atomics.
    if HISTOGRAM:
        cell = tl.arange(0, BINS)  # [BINS]
        tl.atomic_add(matrix + cell, counts.to(tl.int64), mask=counts > 0)
    # A program without invalid labels, the usual case, writes nothing.
    strangers = tl.sum(alien, 0)
    if strangers > 0:
        tl.atomic_add(matrix + classes * classes, strangers.to(tl.int64))
