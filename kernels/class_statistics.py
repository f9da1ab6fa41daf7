"""Count, mean and squared deviations of every class, in one pass over the features."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._common import on_device, padded_classes

ROWS, CHANNELS = 32, 32
"""Number of features and channels of a tile."""

TILES = 16
"""Number of tiles of a program, one below the other."""


def class_statistics_fwd(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``(count [K], mean [K, A], biased variance [K, A])`` in float32; the low-level op of the same name."""
    features, labels = features.contiguous(), labels.contiguous()
    n, width = features.shape
    options = dict(dtype=torch.float32, device=features.device)
    chunks = triton.cdiv(n, ROWS * TILES)
    count = torch.empty(chunks, num_classes, **options)
    mean = torch.empty(chunks, num_classes, width, **options)
    deviation = torch.empty_like(mean)
    with on_device(features):
        if features.numel():
            class_moments[(chunks, triton.cdiv(width, CHANNELS))](
                features,
                labels,
                count,
                mean,
                deviation,
                n,
                width,
                num_classes,
                ignore_index,
                KP=padded_classes(num_classes),
                BN=ROWS,
                BA=CHANNELS,
                TILES=TILES,
                num_warps=8,
            )
    total = count.sum(0)
    share = 1 / total.clamp(min=1)
    pooled = (count[..., None] * mean).sum(0) * share[:, None]
    # Chan et al.: the chunks' own deviations, and those of their means about the pooled mean
    spread = (deviation + count[..., None] * (mean - pooled).square()).sum(0)
    return total, pooled, spread * share[:, None]


@triton.jit
def class_moments(
    features,
    labels,
    counts,
    means,
    deviations,
    n,
    width,
    classes,
    ignore,
    KP: tl.constexpr,
    BN: tl.constexpr,
    BA: tl.constexpr,
    TILES: tl.constexpr,
):
    """A program per ``TILES BN`` features and ``BA`` channels. The deviations of a tile are about its own
    class means, and tiles are merged by Chan's formula, so that a large common mean costs no precision."""
    k = tl.arange(0, KP)  # [KP]
    k_ok = k < classes  # [KP]
    a = tl.program_id(1) * BA + tl.arange(0, BA)  # [BA]
    a_ok = a < width  # [BA]
    count = tl.zeros((KP,), tl.float32)  # [KP]
    mean = tl.zeros((KP, BA), tl.float32)  # [KP, BA]
    deviation = tl.zeros((KP, BA), tl.float32)  # [KP, BA]
    for tile in range(TILES):
        i = (tl.program_id(0) * TILES + tile).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
        ok = i < n  # [BN]
        # A feature without a class gets an invalid label and reads as 0, because it may be infinite or NaN.
        label = tl.load(labels + i, mask=ok, other=-1)  # [BN]
        label = tl.where((label == ignore) | (label >= classes), -1, label).to(tl.int32)
        # [BN, BA]
        x = tl.load(
            features + i[:, None] * width + a[None, :], mask=(label >= 0)[:, None] & a_ok[None, :], other=0.0
        ).to(tl.float32)
        # With membership as 0 and 1, the sums of all classes are one product, without a sort or atomics.
        member = (k[:, None] == label[None, :]).to(tl.float32)  # [KP, BN]
        here = tl.sum(member, 1)  # [KP]
        share = 1.0 / tl.maximum(here, 1.0)  # [KP]
        # not TF32: three products keep 22 bits of a mean, and its error would enter every deviation squared
        local = tl.dot(member, x, input_precision="ieee") * share[:, None]  # [KP, BA]
        own = tl.dot(tl.trans(member), local, input_precision="ieee")  # [BN, BA]
        d = tl.where((label >= 0)[:, None], x - own, 0.0)  # [BN, BA]
        # Errors of squared deviations matter less, so three TF32 products are enough for them.
        spread = tl.dot(member, d * d, input_precision="tf32x3")  # [KP, BA]
        # The tile is merged into the moments of earlier tiles, with the gap between the two means.
        both = count + here  # [KP]
        gap = local - mean  # [KP, BA]
        part = (here / tl.maximum(both, 1.0))[:, None]  # [KP, 1]
        deviation += spread + gap * gap * (count[:, None] * part)
        mean += gap * part
        count = both
    chunk = tl.program_id(0).to(tl.int64)
    # Each program writes its own moments, which torch merges: no atomics, the same bits in every run.
    to = (chunk * classes + k)[:, None] * width + a[None, :]  # [KP, BA]
    mask = k_ok[:, None] & a_ok[None, :]  # [KP, BA]
    tl.store(means + to, mean, mask=mask)
    tl.store(deviations + to, deviation, mask=mask)
    # Counts are the same for all channels, so one program per chunk writes them.
    if tl.program_id(1) == 0:
        tl.store(counts + chunk * classes + k, count, mask=k_ok)
