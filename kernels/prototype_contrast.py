"""SePiCo's contrasts: one product of a tile of features with all prototypes, whose logits stay in registers.

Products are float32 for every type of features, as three TF32 products each, because the whole range of the
loss is smaller than one step of a narrower type. A label that is neither a class nor ``ignore_index`` makes
the loss NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._bank import DEPTH, judged_labels, prototype_contrast_bank_fwd, tile_rows
from fastuda.kernels._common import INTERPRETED, narrow, on_device, padded_classes

__all__ = ["prototype_contrast_bank_fwd", "prototype_contrast_bwd", "prototype_contrast_fwd"]


def weights(mean: Tensor, variance: Tensor | None, tau: float) -> Tensor:
    """Right operand of the product: [K, A], or [K, 2 A] with the variances."""
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
    """A program per ``BN`` features; with ``DIST`` the same loop multiplies their squares by variances."""
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    ok = i < n  # [BN]
    k = tl.arange(0, KP)  # [KP]
    k_ok = k < classes  # [KP]
    depth = width * (2 if DIST else 1)
    # Products with means and with variances are kept apart, because the own logit needs only the first.
    z = tl.zeros((BN, KP), tl.float32)  # [BN, KP]
    spread = tl.zeros((BN, KP), tl.float32)  # [BN, KP]
    for start in range(0, width, BK):
        a = start + tl.arange(0, BK)  # [BK]
        a_ok = a < width  # [BK]
        x_at = features + i[:, None] * width + a[None, :]  # [BN, BK]
        x = tl.load(x_at, mask=ok[:, None] & a_ok[None, :], other=0.0).to(tl.float32)  # [BN, BK]
        w_at = weight + k[None, :] * depth + a[:, None]  # [BK, KP]
        mask = a_ok[:, None] & k_ok[None, :]  # [BK, KP]
        z = tl.dot(x, tl.load(w_at, mask=mask, other=0.0), z, input_precision="tf32x3")
        if DIST:
            w = tl.load(w_at + width, mask=mask, other=0.0)  # [BK, KP]
            spread = tl.dot(x * x, w, spread, input_precision="tf32x3")
    label, valid, alien = judged_labels(labels, i, ok, classes, ignore)  # [BN] each
    # Padded classes are -inf and have no share of the softmax.
    logits = tl.where(k_ok[None, :], z + spread, float("-inf"))  # [BN, KP]
    best = tl.max(logits, 1)  # [BN]
    e = tl.exp(logits - best[:, None])  # [BN, KP]
    total = tl.sum(e, 1)  # [BN]
    # The softmax is stored for the backward; it is 0 if the feature has no class and so no gradient.
    to = share + i[:, None] * classes + k[None, :]  # [BN, KP]
    tl.store(to, tl.where(valid[:, None], e / total[:, None], 0.0), mask=ok[:, None] & k_ok[None, :])
    own = tl.sum(tl.where(k[None, :] == label[:, None], z, 0.0), 1)  # [BN]
    # A label that is neither a class nor ignored makes the loss NaN, because the host does not check labels.
    loss = tl.where(valid, best + tl.log(total) - own, tl.where(alien, float("nan"), 0.0))  # [BN]
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
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    ok = i < n  # [BN]
    a = tl.program_id(1) * BA + tl.arange(0, BA)  # [BA]
    k = tl.arange(0, KP)  # [KP]
    k_ok = k < classes  # [KP]
    depth = width * (2 if DIST else 1)
    mask = ok[:, None] & (a < width)[None, :]  # [BN, BA]
    label = tl.load(labels + i, mask=ok, other=ignore)  # [BN]
    # [BN, KP]
    p = tl.load(share + i[:, None] * classes + k[None, :], mask=ok[:, None] & k_ok[None, :], other=0.0)
    # The own class enters with its share minus 1. An ignored label may equal the number of a class.
    own = (k[None, :] == label[:, None]) & (label != ignore)[:, None]  # [BN, KP]
    w_at = weight + k[:, None] * depth + a[None, :]  # [KP, BA]
    w_mask = k_ok[:, None] & (a < width)[None, :]  # [KP, BA]
    w = tl.load(w_at, mask=w_mask, other=0.0)  # [KP, BA]
    gradient = tl.dot(tl.where(own, p - 1.0, p), w, input_precision="tf32x3")  # [BN, BA]
    at = i[:, None] * width + a[None, :]  # [BN, BA]
    # The own logit has no variance term, so the variances are multiplied by the unchanged shares.
    if DIST:
        w = tl.load(w_at + width, mask=w_mask, other=0.0)
        x = tl.load(features + at, mask=mask, other=0.0).to(tl.float32)  # [BN, BA]
        gradient += 2.0 * x * tl.dot(p, w, input_precision="tf32x3")
    # The gradient stays float32 until it is scaled, and is rounded once.
    tl.store(out + at, narrow(tl.load(grad) * gradient, out, UPCAST), mask=mask)
