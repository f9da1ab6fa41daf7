"""SePiCo's contrasts: a tile of features meets all prototypes in one product, whose logits stay in registers.

Products are of float32 whatever the features are, by three of TF32 each: the loss moves by less than one step
of a narrower type. A label that is neither a class nor ``ignore_index`` makes the loss NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._common import INTERPRETED, narrow, on_device
from fastuda.kernels._upsample import padded_classes

TILE = 2048
"""Features times classes of a tile."""

DEPTH = 32
"""Channels of a step of a product, and of a tile of the gradient."""

MEMBERS = 32
"""Vectors of a bank at a time."""


def tile_rows(padded: int) -> int:
    """Features of a program."""
    return max(16, min(64, TILE // padded))


def weights(mean: Tensor, variance: Tensor | None, tau: float) -> Tensor:
    """What stands on the right of the product: [K, A], or [K, 2 A] with the variances."""
    parts = [mean.float() / tau] + ([] if variance is None else [variance.float() / (2 * tau**2)])
    return torch.cat(parts, 1).contiguous()


def prototype_contrast_fwd(
    features: Tensor, labels: Tensor, mean: Tensor, variance: Tensor | None, tau: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """``(sum of the losses, softmax [N, K])`` in float32; the low-level op of the same name."""
    features, labels = features.contiguous(), labels.contiguous()
    n, width = features.shape
    padded = padded_classes(len(mean))
    rows = tile_rows(padded)
    share = torch.empty((n, len(mean)), dtype=torch.float32, device=features.device)
    partial = torch.empty(triton.cdiv(n, rows), dtype=torch.float32, device=features.device)
    with on_device(features):
        if n:
            prototype_losses[(len(partial),)](
                features,
                labels,
                weights(mean, variance, tau),
                share,
                partial,
                n,
                width,
                len(mean),
                ignore_index,
                DIST=variance is not None,
                KP=padded,
                BN=rows,
                BK=DEPTH,
                num_warps=4,
            )
    return partial.sum(dtype=torch.float64).float(), share


def prototype_contrast_bwd(
    grad: Tensor,
    features: Tensor,
    labels: Tensor,
    share: Tensor,
    mean: Tensor,
    variance: Tensor | None,
    tau: float,
    ignore_index: int,
) -> Tensor:
    """The gradient of the features; the low-level op of the same name."""
    features, labels = features.contiguous(), labels.contiguous()
    n, width = features.shape
    padded = padded_classes(len(mean))
    rows = tile_rows(padded)
    out = torch.empty_like(features)
    with on_device(features):
        if out.numel():
            prototype_gradient[(triton.cdiv(n, rows), triton.cdiv(width, DEPTH))](
                grad.float(),
                features,
                labels,
                share.contiguous(),
                weights(mean, variance, tau),
                out,
                n,
                width,
                len(mean),
                ignore_index,
                DIST=variance is not None,
                UPCAST=INTERPRETED,
                KP=padded,
                BN=rows,
                BA=DEPTH,
                num_warps=4,
            )
    return out


def bank_contrast_fwd(
    features: Tensor,
    labels: Tensor,
    vectors: Tensor,
    count: Tensor,
    tau: float,
    ignore_index: int,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """``(sum of the losses, gradient [N, A] or [0])`` in float32; the low-level op of the same name.

    Features are taken in the order of their labels, so that a tile meets one bank, seldom two.
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
def prototype_losses(
    features,
    labels,
    weight,
    share,
    partial,
    n,
    width,
    classes,
    ignore,
    DIST: tl.constexpr,
    KP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A program per ``BN`` features; with ``DIST`` their squares meet the variances in the same loop."""
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    ok = i < n
    k = tl.arange(0, KP)
    k_ok = k < classes
    depth = width * (2 if DIST else 1)
    z = tl.zeros((BN, KP), tl.float32)
    spread = tl.zeros((BN, KP), tl.float32)
    for start in range(0, width, BK):
        a = start + tl.arange(0, BK)
        a_ok = a < width
        x_at = features + i[:, None] * width + a[None, :]
        x = tl.load(x_at, mask=ok[:, None] & a_ok[None, :], other=0.0).to(tl.float32)
        w_at = weight + k[None, :] * depth + a[:, None]
        mask = a_ok[:, None] & k_ok[None, :]
        z = tl.dot(x, tl.load(w_at, mask=mask, other=0.0), z, input_precision="tf32x3")
        if DIST:
            w = tl.load(w_at + width, mask=mask, other=0.0)
            spread = tl.dot(x * x, w, spread, input_precision="tf32x3")
    label = tl.load(labels + i, mask=ok, other=ignore)
    known = (label != ignore) & (label >= 0) & (label < classes)
    alien = (label != ignore) & (known == 0)
    logits = tl.where(k_ok[None, :], z + spread, float("-inf"))
    best = tl.max(logits, 1)
    e = tl.exp(logits - best[:, None])
    total = tl.sum(e, 1)
    to = share + i[:, None] * classes + k[None, :]
    tl.store(to, tl.where(known[:, None], e / total[:, None], 0.0), mask=ok[:, None] & k_ok[None, :])
    own = tl.sum(tl.where(k[None, :] == label[:, None], z, 0.0), 1)
    loss = tl.where(known, best + tl.log(total) - own, tl.where(alien, float("nan"), 0.0))
    tl.store(partial + tl.program_id(0), tl.sum(loss, 0))


@triton.jit
def prototype_gradient(
    grad,
    features,
    labels,
    share,
    weight,
    out,
    n,
    width,
    classes,
    ignore,
    DIST: tl.constexpr,
    UPCAST: tl.constexpr,
    KP: tl.constexpr,
    BN: tl.constexpr,
    BA: tl.constexpr,
):
    """A program per ``BN`` features and ``BA`` channels."""
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    ok = i < n
    a = tl.program_id(1) * BA + tl.arange(0, BA)
    k = tl.arange(0, KP)
    k_ok = k < classes
    depth = width * (2 if DIST else 1)
    mask = ok[:, None] & (a < width)[None, :]
    label = tl.load(labels + i, mask=ok, other=ignore)
    p = tl.load(share + i[:, None] * classes + k[None, :], mask=ok[:, None] & k_ok[None, :], other=0.0)
    own = (k[None, :] == label[:, None]) & (label != ignore)[:, None]
    w_at = weight + k[:, None] * depth + a[None, :]
    w_mask = k_ok[:, None] & (a < width)[None, :]
    w = tl.load(w_at, mask=w_mask, other=0.0)
    found = tl.dot(tl.where(own, p - 1.0, p), w, input_precision="tf32x3")
    at = i[:, None] * width + a[None, :]
    if DIST:
        w = tl.load(w_at + width, mask=w_mask, other=0.0)
        x = tl.load(features + at, mask=mask, other=0.0).to(tl.float32)
        found += 2.0 * x * tl.dot(p, w, input_precision="tf32x3")
    tl.store(out + at, narrow(tl.load(grad) * found, out, UPCAST), mask=mask)


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
    """A program per ``BN`` features, in the order of their labels: the losses, and the slopes by the products
    with the own bank [N, M] and with the centres [N, K]."""
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    ok = i < n
    row = tl.load(order + i, mask=ok, other=0)
    label = tl.load(labels + row, mask=ok, other=ignore)
    known = (label != ignore) & (label >= 0) & (label < classes)
    alien = (label != ignore) & (known == 0)
    k = tl.arange(0, KP)
    m = tl.arange(0, BM)
    x_at = features + row[:, None] * width
    z = tl.zeros((BN, KP), tl.float32)
    for start in range(0, width, BK):
        a = start + tl.arange(0, BK)
        a_ok = a < width
        x = tl.load(x_at + a[None, :], mask=ok[:, None] & a_ok[None, :], other=0.0).to(tl.float32)
        mask = a_ok[:, None] & (k < classes)[None, :]
        w = tl.load(centre + k[None, :] * width + a[:, None], mask=mask, other=0.0)
        z = tl.dot(x, w, z, input_precision="tf32x3")
    rest = (k < classes)[None, :] & (k[None, :] != label[:, None])
    best = tl.max(tl.where(rest, z, -3.0e38), 1)
    e = tl.where(rest, tl.exp(z - best[:, None]), 0.0)
    total = tl.sum(e, 1)
    negative = best + tl.log(total)
    loss = tl.where(alien, float("nan"), 0.0)
    push = tl.zeros((BN,), tl.float32)
    low = tl.min(tl.where(known, label, classes), 0)
    high = tl.max(tl.where(known, label, -1), 0)
    for c in range(low, high + 1):
        filled = tl.load(count + c)
        mine = known & (label == c)
        for first in range(0, filled, BM):
            positive = tl.zeros((BN, BM), tl.float32)
            own = bank + (tl.cast(c, tl.int64) * length + first + m[None, :]) * width
            here = first + m < filled
            for start in range(0, width, BK):
                a = start + tl.arange(0, BK)
                a_ok = a < width
                x = tl.load(x_at + a[None, :], mask=mine[:, None] & a_ok[None, :], other=0.0).to(tl.float32)
                w = tl.load(own + a[:, None], mask=a_ok[:, None] & here[None, :], other=0.0)
                positive = tl.dot(x, w, positive, input_precision="tf32x3")
            gap = negative[:, None] - positive
            near = tl.exp(-tl.abs(gap))
            term = tl.maximum(gap, 0.0) + tl.log(1.0 + near)
            s = tl.where(gap > 0, 1.0, near) / (1.0 + near) / filled
            valid = mine[:, None] & here[None, :]
            loss += tl.sum(tl.where(valid, term, 0.0), 1) / filled
            push += tl.sum(tl.where(valid, s, 0.0), 1)
            tl.store(slope + i[:, None] * length + first + m[None, :], s, mask=valid)
    to = other + i[:, None] * classes + k[None, :]
    tl.store(to, e / total[:, None] * push[:, None], mask=ok[:, None] & (k < classes)[None, :])
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
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    ok = i < n
    row = tl.load(order + i, mask=ok, other=0)
    label = tl.load(labels + row, mask=ok, other=ignore)
    known = (label != ignore) & (label >= 0) & (label < classes)
    k = tl.arange(0, KP)
    m = tl.arange(0, BM)
    a = tl.program_id(1) * BA + tl.arange(0, BA)
    a_ok = a < width
    k_ok = k < classes
    p = tl.load(other + i[:, None] * classes + k[None, :], mask=known[:, None] & k_ok[None, :], other=0.0)
    w = tl.load(centre + k[:, None] * width + a[None, :], mask=k_ok[:, None] & a_ok[None, :], other=0.0)
    found = tl.dot(p, w, input_precision="tf32x3")
    low = tl.min(tl.where(known, label, classes), 0)
    high = tl.max(tl.where(known, label, -1), 0)
    for c in range(low, high + 1):
        filled = tl.load(count + c)
        mine = known & (label == c)
        for first in range(0, filled, BM):
            here = first + m < filled
            s_at = slope + i[:, None] * length + first + m[None, :]
            s = tl.load(s_at, mask=mine[:, None] & here[None, :], other=0.0)
            own = bank + (tl.cast(c, tl.int64) * length + first + m[:, None]) * width
            w = tl.load(own + a[None, :], mask=here[:, None] & a_ok[None, :], other=0.0)
            found = tl.dot(-s, w, found, input_precision="tf32x3")
    tl.store(grad + row[:, None] * width + a[None, :], found, mask=ok[:, None] & a_ok[None, :])
