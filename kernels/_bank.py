"""SePiCo's contrast with banks: every vector in the bank of the feature's class against the mean similarity
to each other bank."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._common import on_device, padded_classes

TILE = 2048
"""Number of features times number of classes of a tile."""

DEPTH = 32
"""Channels of a step of a product, and of a tile of the gradient."""

MEMBERS = 32
"""Number of bank vectors processed at a time."""


def tile_rows(padded: int) -> int:
    """Features of a program."""
    return max(16, min(64, TILE // padded))


def prototype_contrast_bank_fwd(
    features: Tensor,
    labels: Tensor,
    vectors: Tensor,
    count: Tensor,
    tau: float,
    ignore_index: int,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """``(sum of the losses, gradient [N, A] or [0])`` in float32; the low-level op of the same name.

    Features are processed in the order of their labels, so that a tile mostly needs a single bank.
    """
    features, labels = features.contiguous(), labels.contiguous()
    (n, width), (classes, length, _) = features.shape, vectors.shape
    options = dict(dtype=torch.float32, device=features.device)
    count = count.to(features.device).clamp(max=length)
    filled = torch.arange(length, device=features.device) < count[:, None]
    bank = torch.where(filled[..., None], vectors.to(**options) / tau, 0)
    centre = bank.sum(1) / count.clamp(min=1)[:, None]
    order = torch.where(labels == ignore_index, classes, labels).argsort(stable=True)
    padded = padded_classes(classes)
    rows = tile_rows(padded)
    grad = torch.empty((n, width) if gradient else (0,), **options)
    slope = torch.empty((n, length), **options)
    other = torch.empty((n, classes), **options)
    partial = torch.empty(triton.cdiv(n, rows), **options)
    sizes = (n, width, classes, length, ignore_index)
    constants = dict(KP=padded, BN=rows, BM=MEMBERS)
    with on_device(features):
        if n:
            bank_losses[(len(partial),)](
                *(features, labels, order, bank, count, centre, slope, other, partial, *sizes),
                **constants,
                BK=DEPTH,
                num_warps=8,
            )
        if grad.numel():
            bank_gradient[(len(partial), triton.cdiv(width, DEPTH))](
                *(labels, order, bank, count, centre, slope, other, grad, *sizes),
                **constants,
                BA=DEPTH,
                num_warps=4,
            )
    return partial.sum(dtype=torch.float64).float(), grad


@triton.jit
def judged_labels(labels, at, ok, classes, ignore):
    """The labels at ``at``, which of them are classes, and which are neither a class nor ``ignore``."""
    # A place without a feature reads as ignored, so that it does not count as an invalid label.
    label = tl.load(labels + at, mask=ok, other=ignore)  # as `at`
    is_class = (label != ignore) & (label >= 0) & (label < classes)  # as `at`
    return label, is_class, (label != ignore) & (is_class == 0)


@triton.jit
def sorted_features(labels, order, n, classes, ignore, BN: tl.constexpr):
    """The program's places [BN] in the order of the labels, which of them exist, the features there with the
    result of :func:`judged_labels`, and the range of their classes."""
    # The place is int64, because offsets of rows computed from it exceed 32 bits.
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    ok = i < n  # [BN]
    row = tl.load(order + i, mask=ok, other=0)  # [BN]
    label, is_class, alien = judged_labels(labels, row, ok, classes, ignore)  # [BN] each
    # Places without a class are left out of the range, which is empty if there are no others.
    low = tl.min(tl.where(is_class, label, classes), 0)
    return i, ok, row, label, is_class, alien, low, tl.max(tl.where(is_class, label, -1), 0)


@triton.jit
def add_products(z, x_at, x_ok, w_at, w_ok, width, BK: tl.constexpr):
    """``z`` plus the products of the rows that begin at ``x_at`` and at ``w_at``, of ``width`` channels."""
    # The loop goes over the width in steps, so that rows of any length fit in registers.
    for start in range(0, width, BK):
        a = start + tl.arange(0, BK)  # [BK]
        a_ok = a < width  # [BK]
        x = tl.load(x_at[:, None] + a[None, :], mask=x_ok[:, None] & a_ok[None, :], other=0.0)  # [BN, BK]
        # [BK, KP] of centres, [BK, BM] of a bank
        w = tl.load(w_at[None, :] + a[:, None], mask=a_ok[:, None] & w_ok[None, :], other=0.0)
        # Three TF32 products on the tensor cores are nearly float32.
        z = tl.dot(x.to(tl.float32), w, z, input_precision="tf32x3")  # [BN, KP] or [BN, BM]
    return z


@triton.jit
def bank_losses(
    features,
    labels,
    order,
    bank,
    count,
    centre,
    slope,
    other,
    partial,
    n,
    width,
    classes,
    length,
    ignore,
    KP: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """A program per ``BN`` features, in the order of their labels: the losses, and the slopes with respect to
    the products with the feature's own bank [N, M] and with the centres [N, K]."""
    # i to alien: [BN]; low and high are scalars
    i, ok, row, label, is_class, alien, low, high = sorted_features(labels, order, n, classes, ignore, BN)
    k = tl.arange(0, KP)  # [KP]
    m = tl.arange(0, BM)  # [BM]
    k_ok = k < classes  # [KP]
    x_at = features + row * width  # [BN]
    # The centres replace whole banks: the mean similarity to a bank is the similarity to its mean.
    z = tl.zeros((BN, KP), tl.float32)  # [BN, KP]
    z = add_products(z, x_at, ok, centre + k * width, k_ok, width, BK)
    # The log-sum-exp leaves out the own class and the padding, and is relative to its largest term.
    rest = k_ok[None, :] & (k[None, :] != label[:, None])  # [BN, KP]
    best = tl.max(tl.where(rest, z, -3.0e38), 1)  # [BN]
    e = tl.where(rest, tl.exp(z - best[:, None]), 0.0)  # [BN, KP]
    total = tl.sum(e, 1)  # [BN]
    negative = best + tl.log(total)  # [BN]
    # A label that is neither a class nor ignored makes the loss NaN, because the host does not check labels.
    loss = tl.where(alien, float("nan"), 0.0)  # [BN]
    push = tl.zeros((BN,), tl.float32)  # [BN]
    # Features are in the order of their labels, so that the loop runs over few banks, mostly one.
    for c in range(low, high + 1):
        filled = tl.load(count + c)
        mine = is_class & (label == c)  # [BN]
        for first in range(0, filled, BM):
            positive = tl.zeros((BN, BM), tl.float32)  # [BN, BM]
            own = bank + (tl.cast(c, tl.int64) * length + first + m) * width  # [BM]
            here = first + m < filled  # [BM]
            positive = add_products(positive, x_at, mine, own, here, width, BK)
            # Softplus and its slope share an exponential of a negative number, which cannot overflow.
            gap = negative[:, None] - positive  # [BN, BM]
            near = tl.exp(-tl.abs(gap))  # [BN, BM]
            term = tl.maximum(gap, 0.0) + tl.log(1.0 + near)  # [BN, BM]
            s = tl.where(gap > 0, 1.0, near) / (1.0 + near) / filled  # [BN, BM]
            # Features of other classes and vectors past the filled ones have values that must not count.
            valid = mine[:, None] & here[None, :]  # [BN, BM]
            loss += tl.sum(tl.where(valid, term, 0.0), 1) / filled
            push += tl.sum(tl.where(valid, s, 0.0), 1)
            tl.store(slope + i[:, None] * length + first + m[None, :], s, mask=valid)
    # The slope of a centre is the share of its term times the sum of the slopes of the own bank.
    to = other + i[:, None] * classes + k[None, :]  # [BN, KP]
    tl.store(to, e / total[:, None] * push[:, None], mask=ok[:, None] & k_ok[None, :])
    tl.store(partial + tl.program_id(0), tl.sum(loss, 0))


@triton.jit
def bank_gradient(
    labels,
    order,
    bank,
    count,
    centre,
    slope,
    other,
    grad,
    n,
    width,
    classes,
    length,
    ignore,
    KP: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BA: tl.constexpr,
):
    """A program per ``BN`` features, in the order of their labels, and ``BA`` channels."""
    # i to is_class: [BN]; low and high are scalars
    i, ok, row, label, is_class, _, low, high = sorted_features(labels, order, n, classes, ignore, BN)
    k = tl.arange(0, KP)  # [KP]
    m = tl.arange(0, BM)  # [BM]
    a = tl.program_id(1) * BA + tl.arange(0, BA)  # [BA]
    a_ok = a < width  # [BA]
    k_ok = k < classes  # [KP]
    # The part of the centres comes first; a feature without a class reads 0 and so gets none of it.
    # [BN, KP]
    p = tl.load(other + i[:, None] * classes + k[None, :], mask=is_class[:, None] & k_ok[None, :], other=0.0)
    # [KP, BA]
    w = tl.load(centre + k[:, None] * width + a[None, :], mask=k_ok[:, None] & a_ok[None, :], other=0.0)
    total = tl.dot(p, w, input_precision="tf32x3")  # [BN, BA]
    # The slopes of the own bank are subtracted; only those that were written are read.
    for c in range(low, high + 1):
        filled = tl.load(count + c)
        mine = is_class & (label == c)  # [BN]
        for first in range(0, filled, BM):
            here = first + m < filled  # [BM]
            s_at = slope + i[:, None] * length + first + m[None, :]  # [BN, BM]
            s = tl.load(s_at, mask=mine[:, None] & here[None, :], other=0.0)  # [BN, BM]
            own = bank + (tl.cast(c, tl.int64) * length + first + m[:, None]) * width  # [BM, 1]
            w = tl.load(own + a[None, :], mask=here[:, None] & a_ok[None, :], other=0.0)  # [BM, BA]
            total = tl.dot(-s, w, total, input_precision="tf32x3")
    # The gradient returns to the original order of the features; features without a class get 0.
    tl.store(grad + row[:, None] * width + a[None, :], total, mask=ok[:, None] & a_ok[None, :])
