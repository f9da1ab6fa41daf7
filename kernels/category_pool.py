"""Features weighted by each class's softmax over the pixels: one pass, with a running maximum per class.

Products are float32 for every type of inputs; each is three TF32 products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._common import INTERPRETED, narrow, on_device, padded_classes

ROWS, CHANNELS = 32, 32
"""Number of pixels and channels of a tile."""

TILES = 16
"""Number of tiles of a program, one below the other."""


def category_pool_fwd(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """``(pooled features [B, K, C], log-sum-exp over the pixels [B, K])`` in float32; the low-level op of the
    same name."""
    features, logits = features.contiguous(), logits.contiguous()
    (batch, n, width), classes = features.shape, logits.shape[2]
    options = dict(dtype=torch.float32, device=features.device)
    if not n:
        return torch.zeros(batch, classes, width, **options), torch.zeros(batch, classes, **options)
    chunks = triton.cdiv(n, ROWS * TILES)
    partial = torch.empty(batch, chunks, classes, width, **options)
    top = torch.empty(batch, chunks, classes, **options)
    total = torch.empty_like(top)
    with on_device(features):
        if top.numel():
            pooled_chunks[(batch * chunks, max(1, triton.cdiv(width, CHANNELS)))](
                features,
                logits,
                partial,
                top,
                total,
                n,
                width,
                classes,
                KP=padded_classes(classes),
                BN=ROWS,
                BA=CHANNELS,
                TILES=TILES,
                num_warps=4,
            )
    best = top.amax(1)
    share = (top - best[:, None]).exp()
    mass = (share * total).sum(1)
    return (share[..., None] * partial).sum(1) / mass[..., None], best + mass.log()


def category_pool_bwd(
    grad: Tensor,
    features: Tensor,
    logits: Tensor,
    pooled: Tensor,
    lse: Tensor,
    for_features: bool,
    for_logits: bool,
) -> tuple[Tensor, Tensor]:
    """``(gradient of the features or [0], of the logits or [0])``; the low-level op of the same name."""
    features, logits = features.contiguous(), logits.contiguous()
    grad, lse = grad.float().contiguous(), lse.contiguous()
    (batch, n, width), classes = features.shape, logits.shape[2]
    blocks = triton.cdiv(n, ROWS)
    by_features = features.new_empty(features.shape if for_features else (0,))
    by_logits = logits.new_empty(logits.shape if for_logits else (0,))
    sizes = (n, width, classes)
    constants = dict(UPCAST=INTERPRETED, KP=padded_classes(classes), BN=ROWS, BA=CHANNELS, num_warps=4)
    with on_device(features):
        if by_features.numel():
            pooled_features_gradient[(batch * blocks, triton.cdiv(width, CHANNELS))](
                grad, logits, lse, by_features, *sizes, **constants
            )
        if by_logits.numel():
            along = (grad * pooled).sum(2)
            pooled_logits_gradient[(batch * blocks,)](
                grad, features, logits, lse, along, by_logits, *sizes, **constants
            )
    return by_features, by_logits


@triton.jit
def pooled_chunks(
    features,
    logits,
    partial,
    tops,
    totals,
    n,
    width,
    classes,
    KP: tl.constexpr,
    BN: tl.constexpr,
    BA: tl.constexpr,
    TILES: tl.constexpr,
):
    """A program per image, ``TILES BN`` pixels and ``BA`` channels: sums of ``exp(z - top) f``."""
    chunks = tl.cdiv(n, BN * TILES)
    pid = tl.program_id(0).to(tl.int64)
    b = pid // chunks
    k = tl.arange(0, KP)  # [KP]
    k_ok = k < classes  # [KP]
    a = tl.program_id(1) * BA + tl.arange(0, BA)  # [BA]
    a_ok = a < width  # [BA]
    # The first top is finite, because a difference of two infinities would be NaN.
    top = tl.full((KP,), -3.0e38, tl.float32)  # [KP]
    total = tl.zeros((KP,), tl.float32)  # [KP]
    pooled = tl.zeros((KP, BA), tl.float32)  # [KP, BA]
    for tile in range(TILES):
        i = (pid % chunks * TILES + tile) * BN + tl.arange(0, BN)  # [BN]
        ok = i < n  # [BN]
        z_at = logits + (b * n + i)[None, :] * classes + k[:, None]  # [KP, BN]
        # Pixels past the last are -inf and have no share; classes come first, as in the product.
        z = tl.load(z_at, mask=k_ok[:, None] & ok[None, :], other=float("-inf")).to(tl.float32)  # [KP, BN]
        # The sums are rescaled to the new top before more is added, so that no exponential exceeds 1.
        higher = tl.maximum(top, tl.max(z, 1))  # [KP]
        e = tl.exp(z - higher[:, None])  # [KP, BN]
        scale = tl.exp(top - higher)  # [KP]
        total = total * scale + tl.sum(e, 1)
        # [BN, BA]
        f = tl.load(
            features + (b * n + i)[:, None] * width + a[None, :], mask=ok[:, None] & a_ok[None, :], other=0.0
        )
        pooled = tl.dot(e, f.to(tl.float32), pooled * scale[:, None], input_precision="tf32x3")
        top = higher
    # Each chunk writes its own top and sums, which torch merges: no atomics, the same bits in every run.
    to = partial + (pid * classes + k)[:, None] * width + a[None, :]  # [KP, BA]
    tl.store(to, pooled, mask=k_ok[:, None] & a_ok[None, :])
    # Tops and totals are the same for all channels, so one program per chunk writes them.
    if tl.program_id(1) == 0:
        tl.store(tops + pid * classes + k, top, mask=k_ok)
        tl.store(totals + pid * classes + k, total, mask=k_ok)


@triton.jit
def pixel_shares(logits, lse, b, n, classes, KP: tl.constexpr, BN: tl.constexpr):
    """The program's pixels [BN] of image ``b``, which of them exist, the addresses of their logits [BN, KP],
    which of those exist, and the softmax over the pixels, 0 elsewhere."""
    i = tl.program_id(0) % tl.cdiv(n, BN) * BN + tl.arange(0, BN)  # [BN]
    ok = i < n  # [BN]
    k = tl.arange(0, KP)  # [KP]
    k_ok = k < classes  # [KP]
    at = (b * n + i)[:, None] * classes + k[None, :]  # [BN, KP]
    mask = ok[:, None] & k_ok[None, :]  # [BN, KP]
    z = tl.load(logits + at, mask=mask, other=0.0).to(tl.float32)  # [BN, KP]
    # Shares are recomputed from the stored log-sum-exp, which is less to read than the shares.
    share = tl.exp(z - tl.load(lse + b * classes + k, mask=k_ok, other=0.0)[None, :])  # [BN, KP]
    return i, ok, at, mask, tl.where(mask, share, 0.0)


@triton.jit
def pooled_features_gradient(
    grad,
    logits,
    lse,
    out,
    n,
    width,
    classes,
    UPCAST: tl.constexpr,
    KP: tl.constexpr,
    BN: tl.constexpr,
    BA: tl.constexpr,
):
    """A program per image, ``BN`` pixels and ``BA`` channels."""
    b = (tl.program_id(0) // tl.cdiv(n, BN)).to(tl.int64)
    i, ok, _, _, share = pixel_shares(logits, lse, b, n, classes, KP, BN)  # i and ok: [BN]; share: [BN, KP]
    k = tl.arange(0, KP)  # [KP]
    k_ok = k < classes  # [KP]
    a = tl.program_id(1) * BA + tl.arange(0, BA)  # [BA]
    a_ok = a < width  # [BA]
    # A pixel gets its share of the gradient of every class: one product over the classes.
    g_at = grad + (b * classes + k)[:, None] * width + a[None, :]  # [KP, BA]
    g = tl.load(g_at, mask=k_ok[:, None] & a_ok[None, :], other=0.0)  # [KP, BA]
    gradient = tl.dot(share, g, input_precision="tf32x3")  # [BN, BA]
    to = out + (b * n + i)[:, None] * width + a[None, :]  # [BN, BA]
    tl.store(to, narrow(gradient, out, UPCAST), mask=ok[:, None] & a_ok[None, :])


@triton.jit
def pooled_logits_gradient(
    grad,
    features,
    logits,
    lse,
    along,
    out,
    n,
    width,
    classes,
    UPCAST: tl.constexpr,
    KP: tl.constexpr,
    BN: tl.constexpr,
    BA: tl.constexpr,
):
    """A program per image and ``BN`` pixels."""
    b = (tl.program_id(0) // tl.cdiv(n, BN)).to(tl.int64)
    # i and ok: [BN]; at, mask and share: [BN, KP]
    i, ok, at, mask, share = pixel_shares(logits, lse, b, n, classes, KP, BN)
    k = tl.arange(0, KP)  # [KP]
    k_ok = k < classes  # [KP]
    # The loop goes over the width in steps, so that features of any width fit in registers.
    inner = tl.zeros((BN, KP), tl.float32)  # [BN, KP]
    for start in range(0, width, BA):
        a = start + tl.arange(0, BA)  # [BA]
        a_ok = a < width  # [BA]
        # [BN, BA]
        f = tl.load(
            features + (b * n + i)[:, None] * width + a[None, :], mask=ok[:, None] & a_ok[None, :], other=0.0
        )
        g_at = grad + (b * classes + k)[None, :] * width + a[:, None]  # [BA, KP]
        g = tl.load(g_at, mask=a_ok[:, None] & k_ok[None, :], other=0.0)  # [BA, KP]
        inner = tl.dot(f.to(tl.float32), g, inner, input_precision="tf32x3")
    # The mean of the inner products, weighted by the shares, is known from the pooled features.
    mean = tl.load(along + b * classes + k, mask=k_ok, other=0.0)  # [KP]
    tl.store(out + at, narrow(share * (inner - mean[None, :]), out, UPCAST), mask=mask)
